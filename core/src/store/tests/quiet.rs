//! Which system calls `record` makes: a filter on the recording thread counts all but the allocator's, and lets none of them through.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{begin, child, given, id, open, step, SOON};

/// Calls that were counted, by number.
static CALLS: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];
static REFUSED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

/// What memory takes, and the clock of the test where it is a system call.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigreturn,
];

extern "C" fn count(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a `siginfo_t` of a SIGSYS, in which the number of the call stands at this place (after signal, errno,
    // code, padding and the call's address).
    let number = unsafe { *info.cast::<u8>().add(24).cast::<libc::c_int>() };
    if let Some(calls) = CALLS.get(number as usize) {
        calls.fetch_add(1, Ordering::Relaxed);
    }
}

/// From here on every system call of this thread but the allowed ones ends in [`count`] and is not made.
fn filter() {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (at, number) in ALLOWED.iter().enumerate() {
        program.push(libc::sock_filter {
            jt: (ALLOWED.len() - at) as u8,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, *number as u32)
        });
    }
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_TRAP,
    ));
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
    ));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the handler only adds to an atomic; the filter is a valid program that lives until the call returns, and concerns this
    // thread alone.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()),
            0
        );
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let set = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program);
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
#[ignore = "the process of the next test, because a filter on system calls is for life"]
fn child_whose_recording_thread_may_make_no_system_call() {
    let store = Arc::new(open(std::path::Path::new(&given("LOCUM_TEST_STORE"))));
    let steps: u32 = given("LOCUM_TEST_STEPS").parse().unwrap();
    store.record(begin(1)).unwrap();
    let theirs = store.clone();
    std::thread::spawn(move || {
        let text = "x".repeat(2048);
        // The writer is awake, the thread has its buffers.
        for index in 1..=100 {
            theirs.record(step(1, index, &text)).unwrap();
        }
        filter();
        let mut due = Instant::now();
        for index in 101..=steps {
            let record = step(1, index, &text);
            let refused = theirs.record(record).is_err();
            REFUSED.fetch_add(refused as u64, Ordering::Relaxed);
            due += Duration::from_micros(200);
            while Instant::now() < due {
                std::hint::spin_loop();
            }
        }
        DONE.store(true, Ordering::Release);
        // Even to end would be a system call.
        loop {
            std::hint::spin_loop();
        }
    });
    while !DONE.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(REFUSED.load(Ordering::Relaxed), 0);
    let calls: Vec<u64> = CALLS.iter().map(|n| n.load(Ordering::Relaxed)).collect();
    let futex = calls[libc::SYS_futex as usize];
    println!("{futex} waits for a lock of the allocator's in {steps} steps");
    // It may wait for the writer, which frees what was recorded, seldom.
    assert!(futex <= u64::from(steps) / 200, "{futex}");
    assert_eq!(calls.iter().sum::<u64>(), futex, "{calls:?}");
    store.flush(SOON).unwrap();
    let episode = store.episode(id(1)).unwrap().unwrap();
    assert_eq!(episode.steps.len(), steps as usize);
}

#[test]
fn to_record_makes_no_system_call() {
    let folder = tempfile::tempdir().unwrap();
    let name = "quiet::child_whose_recording_thread_may_make_no_system_call";
    let process = child(name, &folder.path().join("s"), 1, 5_000);
    let output = process.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    println!(
        "{}",
        text.lines()
            .find(|l| l.contains("waits for a lock"))
            .unwrap_or_default()
    );
}
