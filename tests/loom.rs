//! The handle table, the recorder's doze, the queue of events and the swap of students under loom: each model is run in every order of
//! steps that its threads can take, with the weak memory orders among them. The files are those of the library; only what they import
//! as `sync` is loom's.

mod sync {
    pub use loom::sync::atomic::{fence, AtomicBool, Ordering};
    pub use loom::sync::{Arc, Mutex, MutexGuard, RwLock};
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
#[path = "../core/src/locum/queue.rs"]
mod queue;
#[path = "../core/src/locum/swap.rs"]
mod swap;

use loom::sync::atomic::AtomicUsize;
use loom::sync::Condvar;
use loom::thread;

use doze::Doze;
use handles::{BadHandle, Kind, Table};
use queue::{Bell, Queue};
use swap::Swap;
use sync::{Arc, Mutex, Ordering};

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

/// A bell as the system's: it stays rung until it is silenced, and whoever waits for it wakes.
#[derive(Default)]
struct Rung {
    level: Mutex<bool>,
    rang: Condvar,
}

impl Rung {
    fn wait(&self) {
        let mut level = self.level.lock().unwrap();
        while !*level {
            level = self.rang.wait(level).unwrap();
        }
    }

    fn set(&self, level: bool) {
        *self.level.lock().unwrap() = level;
        self.rang.notify_all();
    }
}

impl Bell for Rung {
    fn ring(&self) {
        self.set(true);
    }

    fn silence(&self) {
        self.set(false);
    }
}

/// A host that waits for the bell, drains, and waits again gets every event of all threads; a bell that is silent over an event would
/// leave it waiting for ever, which loom tells.
fn no_event_is_left_behind_with_the_bell_silent() {
    let queue = Arc::new(Queue::new(8, Rung::default()));
    let pushers = [1, 2].map(|event| {
        let queue = queue.clone();
        thread::spawn(move || queue.push(event))
    });
    let mut got = Vec::new();
    while got.len() < 2 {
        queue.bell.wait();
        got.extend(std::iter::from_fn(|| queue.pop()));
    }
    for pusher in pushers {
        pusher.join().expect("it does not panic");
    }
    assert!(!*queue.bell.level.lock().unwrap(), "nothing is left");
    assert_eq!(got.iter().sum::<i32>(), 3, "each once: {got:?}");
}

/// A full queue drops its oldest and counts it: what is popped and what was dropped are all that came, and the newest is there.
fn what_a_full_queue_drops_is_counted_and_never_the_newest() {
    let queue = Arc::new(Queue::new(1, Rung::default()));
    let pusher = {
        let queue = queue.clone();
        thread::spawn(move || (1..=3).for_each(|event| queue.push(event)))
    };
    let mut got: Vec<u64> = queue.pop().into_iter().collect();
    pusher.join().expect("it does not panic");
    assert_eq!(*queue.bell.level.lock().unwrap(), got.last() != Some(&3));
    got.extend(queue.take());
    assert!(!*queue.bell.level.lock().unwrap(), "it was taken");
    assert!(got.is_sorted(), "in their order: {got:?}");
    assert_eq!(got.last(), Some(&3));
    assert_eq!(got.len() as u64 + queue.dropped(), 3);
}

/// Who serves and the evidence on it, as versions that must always be the same.
struct Served {
    student: usize,
    evidence: usize,
}

impl Served {
    fn put(&mut self, version: usize) {
        self.student = version;
        self.evidence = version;
    }
}

fn version(stored: &AtomicUsize) -> Option<usize> {
    Some(stored.load(Ordering::SeqCst))
}

/// What the keeper does each second, for a student.
fn follow(swap: &Swap<usize, Served>, stored: &AtomicUsize) {
    let take_up = |seen: &usize, now: &usize| {
        if seen != now {
            swap.serving().put(*now);
        }
    };
    swap.follow(|| version(stored), take_up);
}

/// Version 1, stored and serving.
fn one_serves() -> (Arc<AtomicUsize>, Arc<Swap<usize, Served>>) {
    let served = Served {
        student: 1,
        evidence: 1,
    };
    (
        Arc::new(AtomicUsize::new(1)),
        Arc::new(Swap::new(1, served)),
    )
}

fn promote(swap: &Swap<usize, Served>, stored: &AtomicUsize, version: usize) {
    let store = |seen: &mut usize| {
        stored.store(version, Ordering::SeqCst);
        *seen = version;
        Ok::<_, ()>(version)
    };
    swap.change(store, Served::put).expect("the store is there");
}

/// A promotion beside the keeper's look and a step: what was promoted serves from then on, and nobody sees half of a swap.
fn a_look_from_before_a_promotion_does_not_undo_it() {
    let (stored, swap) = one_serves();
    let keeper = {
        let (swap, stored) = (swap.clone(), stored.clone());
        thread::spawn(move || follow(&swap, &stored))
    };
    let step = {
        let swap = swap.clone();
        thread::spawn(move || {
            let serving = swap.serving();
            assert_eq!(serving.student, serving.evidence);
            serving.student
        })
    };
    promote(&swap, &stored, 2);
    assert_eq!(swap.serving().student, 2, "it was promoted");
    keeper.join().expect("it does not panic");
    assert_eq!(swap.serving().student, 2, "it stays so");
    assert!((1..=2).contains(&step.join().expect("it does not panic")));
}

/// Two changes at once: who serves is who the store names, whichever was last.
fn who_was_stored_last_serves() {
    let (stored, swap) = one_serves();
    let other = {
        let (swap, stored) = (swap.clone(), stored.clone());
        thread::spawn(move || promote(&swap, &stored, 3))
    };
    promote(&swap, &stored, 2);
    other.join().expect("it does not panic");
    assert_eq!(Some(swap.serving().student), version(&stored));
}

/// What another process promotes serves here behind the next look, whatever was looked at and changed meanwhile.
fn what_another_process_stores_serves_behind_the_next_look() {
    let (stored, swap) = one_serves();
    let process = {
        let stored = stored.clone();
        thread::spawn(move || stored.store(4, Ordering::SeqCst))
    };
    let keeper = {
        let (swap, stored) = (swap.clone(), stored.clone());
        thread::spawn(move || follow(&swap, &stored))
    };
    promote(&swap, &stored, 2);
    process.join().expect("it does not panic");
    keeper.join().expect("it does not panic");
    follow(&swap, &stored);
    assert_eq!(Some(swap.serving().student), version(&stored));
}

/// Two that take back the same student, as an alarm and an operator may: one of them does, and its successor stays in service.
fn a_student_is_taken_back_once() {
    let (stored, swap) = one_serves();
    promote(&swap, &stored, 2);
    let take_back = |swap: &Swap<usize, Served>, stored: &AtomicUsize| {
        let store = |seen: &mut usize| {
            let gone = version(stored).filter(|version| *version == 2);
            let next = gone.map(|version| version - 1);
            if let Some(next) = next {
                stored.store(next, Ordering::SeqCst);
                *seen = next;
            }
            Ok::<_, ()>(next)
        };
        let serve = |serving: &mut Served, next: Option<usize>| {
            next.map(|next| serving.put(next)).is_some()
        };
        swap.change(store, serve).expect("the store is there")
    };
    let other = {
        let (swap, stored) = (swap.clone(), stored.clone());
        thread::spawn(move || take_back(&swap, &stored))
    };
    let mine = take_back(&swap, &stored);
    follow(&swap, &stored);
    let theirs = other.join().expect("it does not panic");
    assert!(mine ^ theirs, "once");
    assert_eq!(swap.serving().student, 1);
    assert_eq!(version(&stored), Some(1));
}

fn main() {
    type Model = (&'static str, fn());
    let models: [Model; 9] = [
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
        (
            "no_event_is_left_behind_with_the_bell_silent",
            no_event_is_left_behind_with_the_bell_silent,
        ),
        (
            "what_a_full_queue_drops_is_counted_and_never_the_newest",
            what_a_full_queue_drops_is_counted_and_never_the_newest,
        ),
        (
            "a_look_from_before_a_promotion_does_not_undo_it",
            a_look_from_before_a_promotion_does_not_undo_it,
        ),
        ("who_was_stored_last_serves", who_was_stored_last_serves),
        (
            "what_another_process_stores_serves_behind_the_next_look",
            what_another_process_stores_serves_behind_the_next_look,
        ),
        ("a_student_is_taken_back_once", a_student_is_taken_back_once),
    ];
    for (name, model) in models {
        loom::model(model);
        println!("loom: {name} ... ok");
    }
}
