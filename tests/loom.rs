//! The handle table and the recorder's doze under loom: each model is run in every order of steps that its threads can take, with the
//! weak memory orders among them. The files are those of the library; only what they import as `sync` is loom's.

mod sync {
    pub use loom::sync::atomic::{fence, AtomicBool, Ordering};
    pub use loom::sync::{Arc, RwLock};
}

#[path = "../core/src/store/doze.rs"]
mod doze;
#[allow(
    dead_code,
    unused_imports,
    reason = "the library and its unit tests use the rest"
)]
#[path = "../plugin-api/src/handles.rs"]
mod handles;

use loom::sync::atomic::AtomicUsize;
use loom::thread;

use doze::Doze;
use handles::{BadHandle, Kind, Table};
use sync::{Arc, Ordering};

/// What two threads do with one handle: whoever takes the object out has it alone, and nobody sees the object that gets its slot.
fn a_handle_is_given_back_once_and_never_names_another_object() {
    let table = Arc::new(Table::new(Kind::Call, 0));
    let first = table.insert(Arc::new(1)).expect("there is room");
    let giver = {
        let table = table.clone();
        thread::spawn(move || {
            let taken = table.remove(first).is_ok();
            let second = table.insert(Arc::new(2)).expect("there is room");
            assert_eq!(table.get(second).map(|x| *x), Ok(2));
            taken
        })
    };
    match table.get(first) {
        Ok(seen) => assert_eq!(*seen, 1),
        Err(why) => assert_eq!(why, BadHandle::Stale),
    }
    let taken = table.remove(first).is_ok();
    assert!(taken ^ giver.join().expect("it does not panic"), "once");
    assert_eq!(table.get(first).err(), Some(BadHandle::Stale));
}

/// Closing a store takes out all of its objects while another thread begins one: it is either taken out too or alive and found.
fn what_is_begun_while_all_are_taken_out_is_taken_or_found() {
    let table = Arc::new(Table::new(Kind::Episode, 0));
    table.insert(Arc::new(7)).expect("there is room");
    let closer = {
        let table = table.clone();
        thread::spawn(move || table.remove_where(|x| *x == 7).len())
    };
    let late = table.insert(Arc::new(7)).expect("there is room");
    let found = table.get(late).is_ok();
    let taken = closer.join().expect("it does not panic");
    assert!(taken == 2 || (taken == 1 && found), "{taken} {found}");
    assert_eq!(table.get(late).is_ok(), taken == 1);
}

/// The writer sleeps without a limit once it sees nothing, and who records wakes it only if it says that it sleeps: no order of their
/// steps leaves a record behind in the queue with nobody awake. A wake that is lost would leave the model deadlocked, which loom tells.
fn a_record_is_never_left_behind_with_the_writer_asleep() {
    let doze = Arc::new(Doze::default());
    let queued = Arc::new(AtomicUsize::new(0));
    let writer = {
        let (doze, queued) = (doze.clone(), queued.clone());
        thread::spawn(move || {
            let mut taken = 0;
            while taken < 2 {
                let waiting = queued.load(Ordering::Relaxed);
                if waiting > taken {
                    taken = waiting;
                    continue;
                }
                doze.unless(|| queued.load(Ordering::Relaxed) > taken, thread::park);
            }
        })
    };
    for _ in 0..2 {
        queued.fetch_add(1, Ordering::Relaxed);
        if doze.must_be_woken() {
            writer.thread().unpark();
        }
    }
    writer.join().expect("it does not panic");
}

fn main() {
    let models: [(&str, fn()); 3] = [
        (
            "a_handle_is_given_back_once_and_never_names_another_object",
            a_handle_is_given_back_once_and_never_names_another_object,
        ),
        (
            "what_is_begun_while_all_are_taken_out_is_taken_or_found",
            what_is_begun_while_all_are_taken_out_is_taken_or_found,
        ),
        (
            "a_record_is_never_left_behind_with_the_writer_asleep",
            a_record_is_never_left_behind_with_the_writer_asleep,
        ),
    ];
    for (name, model) in models {
        loom::model(model);
        println!("loom: {name} ... ok");
    }
}
