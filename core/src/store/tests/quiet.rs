//! Which system calls `record` makes: a filter on the recording thread hands each of them to a handler, which counts it and makes it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{begin, child, given, id, open, step, SOON};

/// Calls that were counted, by number.
static CALLS: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];
static REFUSED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

/// What the allocator asks the system for.
const MEMORY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
];

std::arch::global_asm!(
    "locum_test_syscall:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "mov r8, r9",
    "mov r9, [rsp + 8]",
    "syscall",
    "locum_test_syscall_made:",
    "ret",
);

extern "C" {
    /// A system call by number with six arguments; the one place from which the filter lets them through.
    fn locum_test_syscall(n: i64, a: i64, b: i64, c: i64, d: i64, e: i64, f: i64) -> i64;
    /// Where the kernel finds the instruction pointer of such a call.
    static locum_test_syscall_made: u8;
}

extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives the registers of the thread as they were at the call, which is made with them here, and its result
    // stands where the thread expects it.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = |register: libc::c_int| register as usize;
        let number = registers[at(libc::REG_RAX)];
        if let Some(calls) = CALLS.get(number as usize) {
            calls.fetch_add(1, Ordering::Relaxed);
        }
        registers[at(libc::REG_RAX)] = locum_test_syscall(
            number,
            registers[at(libc::REG_RDI)],
            registers[at(libc::REG_RSI)],
            registers[at(libc::REG_RDX)],
            registers[at(libc::REG_R10)],
            registers[at(libc::REG_R8)],
            registers[at(libc::REG_R9)],
        );
    }
}

/// From here on every system call of this thread goes through [`count`].
fn filter() {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let equals = |k, jt, jf| libc::sock_filter {
        jt,
        jf,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k)
    };
    let give = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    let made = (&raw const locum_test_syscall_made) as u64;
    // `seccomp_data`: the number at 0, the instruction pointer at 8 (low half) and 12.
    let mut program = [
        load(0),
        equals(libc::SYS_rt_sigreturn as u32, 4, 0),
        load(8),
        equals(made as u32, 0, 3),
        load(12),
        equals((made >> 32) as u32, 0, 1),
        give(libc::SECCOMP_RET_ALLOW),
        give(libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the handler only adds to an atomic and makes the call; the filter is a valid program that lives until `prctl` returns,
    // and concerns this thread alone.
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
        // Its end would be counted, too.
        loop {
            std::hint::spin_loop();
        }
    });
    while !DONE.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(REFUSED.load(Ordering::Relaxed), 0);
    let calls: Vec<u64> = CALLS.iter().map(|n| n.load(Ordering::Relaxed)).collect();
    let of = |numbers: &[libc::c_long]| numbers.iter().map(|n| calls[*n as usize]).sum::<u64>();
    let (memory, futex) = (of(MEMORY), of(&[libc::SYS_futex]));
    println!(
        "{steps} steps: {memory} calls for memory, {futex} waits for a lock of the allocator's"
    );
    // The allocator's lock is held at times by the writer, which frees what was recorded. How often it asks for memory is its own
    // affair, and more often where the writer falls behind. To wake the writer each time would be one wait a step.
    assert!(futex <= u64::from(steps) / 20, "{futex}");
    assert_eq!(calls.iter().sum::<u64>(), futex + memory, "{calls:?}");
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
            .find(|l| l.contains("calls for memory"))
            .unwrap_or_default()
    );
}
