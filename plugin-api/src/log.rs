//! Log lines to the host's callback: `tracing` events of our copy of the library, one line each, through a bounded queue to
//! a thread of ours, so that no thread that works ever waits for the host's function.

use std::ffi::{c_char, c_void, CString};
use std::fmt::Write;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Mutex, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::fork::{self, PerProcess};
use crate::guard::{guard_status, in_callback, quiet_panics};
use crate::status::{Failure, E_MEMORY, OK};
use locum_core::threads::SignalsBlocked;

/// Lines delivered in one second; the rest is counted.
pub const MAX_LINES_A_SECOND: u32 = 200;
/// Lines waiting for the host's function.
const MAX_QUEUED_LINES: usize = 1024;
/// Bytes of one line; the rest is cut.
const MAX_LINE_BYTES: usize = 4096;

pub type LogFn = unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char, usize);
pub type DoneFn = unsafe extern "C" fn(*mut c_void);

/// A function of the host with its data, and its finaliser, which runs when this is dropped.
pub struct Hook<F> {
    pub call: F,
    pub user_data: *mut c_void,
    pub done: Option<DoneFn>,
}

// SAFETY: locum.h says that callbacks and finalisers come from any thread, so what the host passes must allow that.
unsafe impl<F: Send> Send for Hook<F> {}

impl<F> Drop for Hook<F> {
    fn drop(&mut self) {
        if let Some(done) = self.done {
            // SAFETY: locum.h: `done` is called once with the `user_data` it came with; this is the only place.
            in_callback(|| unsafe { done(self.user_data) });
        }
    }
}

struct Line {
    level: i32,
    target: &'static str,
    text: String,
}

#[derive(Default)]
struct Log {
    /// Most talkative level delivered; 0 = off.
    level: AtomicI32,
    sink: Mutex<Option<Sink>>,
    second: AtomicU64,
    lines: AtomicU32,
    left_out: AtomicU64,
}

struct Sink {
    queue: SyncSender<Line>,
    thread: JoinHandle<()>,
}

static LOG: PerProcess<Log> = PerProcess::new(Log::default);

/// # Safety
/// `log` and `done` are functions as locum.h describes them, and `user_data` may be given to them from any thread.
#[no_mangle]
pub unsafe extern "C" fn locum_set_log(
    log: Option<LogFn>,
    user_data: *mut c_void,
    done: Option<DoneFn>,
    max_level: i32,
) -> i32 {
    guard_status("locum_set_log", |_| {
        if !(0..=5).contains(&max_level) {
            return Err(Failure::argument(format!(
                "max_level is {max_level}; it goes from 0 to 5"
            )));
        }
        fork::watch();
        quiet_panics();
        dispatch_here();
        let fresh = match log {
            Some(call) if max_level > 0 => Some(start(call, user_data, done)?),
            _ => None,
        };
        let off = fresh.is_none();
        let state = LOG.get();
        let old = {
            let mut sink = state.sink.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *sink, fresh)
        };
        state
            .level
            .store(if off { 0 } else { max_level }, Ordering::Release);
        tracing::callsite::rebuild_interest_cache();
        if let Some(Sink { queue, thread }) = old {
            // The thread ends, and finalises, when it has delivered what was queued.
            drop(queue);
            let _ = thread.join();
        }
        if let (true, Some(done)) = (off, done) {
            drop(Hook {
                call: (),
                user_data,
                done: Some(done),
            });
        }
        Ok(OK)
    })
}

fn start(call: LogFn, user_data: *mut c_void, done: Option<DoneFn>) -> Result<Sink, Failure> {
    let (queue, lines) = sync_channel(MAX_QUEUED_LINES);
    // On an error the finaliser must not run, so the hook is only built inside the thread.
    let parts = Hook {
        call,
        user_data,
        done: None,
    };
    let _signals = SignalsBlocked::new();
    let thread = std::thread::Builder::new()
        .name("locum-log".into())
        .spawn(move || {
            let mut hook = parts;
            hook.done = done;
            deliver(&hook, &lines);
        })
        .map_err(|e| {
            Failure::new(
                E_MEMORY,
                format!("no thread for the log could be started: {e}"),
            )
        })?;
    Ok(Sink { queue, thread })
}

fn deliver(hook: &Hook<LogFn>, lines: &Receiver<Line>) {
    for line in lines {
        let Ok(target) = CString::new(line.target) else {
            continue;
        };
        // SAFETY: the host promises a function of this type that may be called from any thread (locum.h, callbacks); target
        // and text live until it returns.
        in_callback(|| unsafe {
            (hook.call)(
                hook.user_data,
                line.level,
                target.as_ptr(),
                line.text.as_ptr().cast(),
                line.text.len(),
            )
        });
    }
}

/// Makes our copy of `tracing` speak to us. In a Rust host that links us statically and has a subscriber already, that one
/// keeps all events.
fn dispatch_here() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = tracing::dispatcher::set_global_default(tracing::Dispatch::new(ToHost));
    });
}

struct ToHost;

fn number(level: &Level) -> i32 {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

impl Subscriber for ToHost {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && number(metadata.level()) <= LOG.get().level.load(Ordering::Acquire)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LOG.get().level.load(Ordering::Acquire) {
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            5 => LevelFilter::TRACE,
            _ => LevelFilter::OFF,
        })
    }

    fn event(&self, event: &Event<'_>) {
        let log = LOG.get();
        let left_out = match log.admit() {
            Some(left_out) => left_out,
            None => return,
        };
        let mut text = Text::default();
        event.record(&mut text);
        if left_out > 0 {
            let _ = write!(text.fields, " ({left_out} earlier lines left out)");
        }
        let line = Line {
            level: number(event.metadata().level()),
            target: event.metadata().target(),
            text: text.finish(),
        };
        // A panic hook may come here while this thread holds the lock: then the line is lost, not the thread.
        if let Ok(sink) = log.sink.try_lock() {
            if sink
                .as_ref()
                .is_some_and(|sink| sink.queue.try_send(line).is_ok())
            {
                return;
            }
        }
        log.left_out.fetch_add(1, Ordering::Relaxed);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl Log {
    /// `None` if this second has had its lines, else how many were left out since the last delivered one.
    fn admit(&self) -> Option<u64> {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let second = START.get_or_init(Instant::now).elapsed().as_secs() + 1;
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.lines.store(0, Ordering::Relaxed);
        }
        if self.lines.fetch_add(1, Ordering::Relaxed) >= MAX_LINES_A_SECOND {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Ordering::Relaxed))
    }
}

/// An event's message, then its other fields as ` name=value`.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            name => {
                let _ = write!(self.fields, " {name}={value}");
            }
        }
    }
}

impl Text {
    fn finish(self) -> String {
        escape(&(self.message + &self.fields))
    }
}

/// One line of at most `MAX_LINE_BYTES`: control characters are written as `\n` or `\u{1b}`, so that a recorded text can
/// neither forge a second line nor steer a terminal.
fn escape(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_LINE_BYTES));
    for c in text.chars() {
        if line.len() + 12 > MAX_LINE_BYTES {
            line.push('…');
            break;
        }
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The log is one per process, so these tests take turns.
    static TURN: Mutex<()> = Mutex::new(());

    #[derive(Default)]
    struct Heard {
        lines: Mutex<Vec<(i32, String, String)>>,
        done: AtomicU32,
        refused: AtomicU32,
    }

    unsafe extern "C" fn hear(
        data: *mut c_void,
        level: i32,
        target: *const c_char,
        text: *const c_char,
        len: usize,
    ) {
        // SAFETY: the test passes a Heard that outlives the hook; target and text are as locum.h says.
        unsafe {
            let heard = &*data.cast::<Heard>();
            let target = std::ffi::CStr::from_ptr(target)
                .to_str()
                .unwrap()
                .to_string();
            let text = std::str::from_utf8(std::slice::from_raw_parts(text.cast(), len))
                .unwrap()
                .to_string();
            heard.lines.lock().unwrap().push((level, target, text));
            if locum_set_log(None, std::ptr::null_mut(), None, 0) == crate::status::E_MISUSE {
                heard.refused.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    unsafe extern "C" fn finish(data: *mut c_void) {
        // SAFETY: as in `hear`.
        unsafe { &*data.cast::<Heard>() }
            .done
            .fetch_add(1, Ordering::SeqCst);
    }

    fn set(heard: &Heard, level: i32) -> i32 {
        let data = (heard as *const Heard).cast_mut().cast();
        // SAFETY: each test takes its hook away before `heard` goes.
        unsafe { locum_set_log(Some(hear), data, Some(finish), level) }
    }

    fn off() {
        // SAFETY: nothing is passed.
        let status = unsafe { locum_set_log(None, std::ptr::null_mut(), None, 0) };
        assert_eq!(status, OK);
    }

    #[test]
    fn lines_arrive_with_their_level_one_line_each_and_the_finaliser_runs_once() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = Heard::default();
        assert_eq!(set(&heard, 3), OK);
        tracing::info!(target: "locum::test", n = 3, "one\ntwo\u{1b}[31m");
        tracing::debug!(target: "locum::test", "too quiet");
        off();
        let lines = heard.lines.lock().unwrap();
        let ours: Vec<_> = lines.iter().filter(|l| l.1 == "locum::test").collect();
        assert_eq!(ours.len(), 1, "{lines:?}");
        assert_eq!(ours[0].0, 3);
        assert_eq!(ours[0].2, "one\\ntwo\\u{1b}[31m n=3");
        assert_eq!(heard.done.load(Ordering::SeqCst), 1);
        assert_eq!(
            heard.refused.load(Ordering::SeqCst) as usize,
            lines.len(),
            "no export may be called from a callback"
        );
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = Heard::default();
        assert_eq!(set(&heard, 1), OK);
        for n in 0..5_000 {
            tracing::error!(target: "locum::flood", n, "line");
        }
        std::thread::sleep(std::time::Duration::from_millis(1_050));
        tracing::error!(target: "locum::flood", "after");
        off();
        let lines = heard.lines.lock().unwrap();
        assert!(
            lines.len() <= 3 * MAX_LINES_A_SECOND as usize,
            "{} lines",
            lines.len()
        );
        let told: usize = lines
            .iter()
            .filter_map(|l| {
                l.2.split_once(" (")?
                    .1
                    .split_once(" earlier lines left out")?
                    .0
                    .parse::<usize>()
                    .ok()
            })
            .sum();
        // Tests beside this one log a few caught panics.
        let counted = told + lines.len();
        assert!(
            (5_001..5_020).contains(&counted),
            "every line is delivered or counted: {counted}"
        );
        assert_eq!(heard.done.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_refused_registration_finalises_nothing() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = Heard::default();
        assert_eq!(set(&heard, 6), crate::status::E_ARGUMENT);
        assert_eq!(set(&heard, -1), crate::status::E_ARGUMENT);
        assert_eq!(heard.done.load(Ordering::SeqCst), 0);
        assert_eq!(set(&heard, 0), OK);
        assert_eq!(
            heard.done.load(Ordering::SeqCst),
            1,
            "switching off finalises what came with it"
        );
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        let line = escape(&"é".repeat(MAX_LINE_BYTES));
        assert!(line.len() <= MAX_LINE_BYTES && line.ends_with('…'));
    }
}
