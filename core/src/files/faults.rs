//! The points at which core's own tests make an operation on disk fail, or the process die.
//!
//! A point is an operation and the name of the file it is done to: `rename current.json`. Outside core's tests all of this is an
//! inlined `Ok`.

use std::io;
use std::path::Path;

/// How an operation goes on.
pub enum Fate {
    Go,
    /// Write the first half only, then return what this gives, if it returns.
    #[cfg_attr(not(test), allow(dead_code, reason = "only tests write short"))]
    Short(fn() -> io::Error),
}

/// Asks what becomes of a write. Without a test's order: [`Fate::Go`].
#[cfg(not(test))]
#[inline(always)]
pub fn point(_operation: &'static str, _path: &Path) -> io::Result<Fate> {
    Ok(Fate::Go)
}

/// Asks what becomes of an operation that cannot be done by halves.
#[inline(always)]
pub fn check(operation: &'static str, path: &Path) -> io::Result<()> {
    match point(operation, path)? {
        Fate::Go => Ok(()),
        Fate::Short(then) => Err(then()),
    }
}

#[cfg(test)]
pub use ordered::{arm, point, record, Act};

#[cfg(test)]
mod ordered {
    use std::collections::BTreeMap;
    use std::io;
    use std::path::Path;
    use std::sync::Mutex;

    use super::Fate;

    /// What happens at a point.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Act {
        /// The process is gone before the operation.
        Kill,
        /// The operation fails once.
        Eio,
        /// The disk is full from here on: every point fails.
        Enospc,
        /// Half of a write is done, and it fails.
        Short,
        /// Half of a write is done, and the process is gone.
        Torn,
    }

    impl Act {
        pub const ALL: [Act; 5] = [Act::Kill, Act::Eio, Act::Enospc, Act::Short, Act::Torn];

        pub fn word(self) -> &'static str {
            match self {
                Act::Kill => "kill",
                Act::Eio => "eio",
                Act::Enospc => "enospc",
                Act::Short => "short",
                Act::Torn => "torn",
            }
        }

        pub fn of(word: &str) -> Act {
            let act = Self::ALL.into_iter().find(|act| act.word() == word);
            act.unwrap_or_else(|| panic!("{word:?} is no act"))
        }
    }

    struct Order {
        point: String,
        left: u64,
        act: Act,
    }

    #[derive(Default)]
    struct State {
        order: Option<Order>,
        full: bool,
        seen: Option<BTreeMap<String, u64>>,
    }

    static STATE: Mutex<State> = Mutex::new(State {
        order: None,
        full: false,
        seen: None,
    });

    /// Orders that `act` happens when this process comes to `point` for the `nth` time (1 is the first). For a process of its own.
    pub fn arm(point: &str, nth: u64, act: Act) {
        STATE.lock().unwrap().order = Some(Order {
            point: point.into(),
            left: nth,
            act,
        });
    }

    /// Counts from now on how often this process comes to each point, and gives what was counted so far.
    pub fn record() -> BTreeMap<String, u64> {
        STATE.lock().unwrap().seen.get_or_insert_default().clone()
    }

    pub fn point(operation: &'static str, path: &Path) -> io::Result<Fate> {
        let mut state = STATE.lock().unwrap();
        if state.order.is_none() && state.seen.is_none() && !state.full {
            return Ok(Fate::Go);
        }
        let point = format!("{operation} {}", name(path));
        if let Some(seen) = &mut state.seen {
            *seen.entry(point.clone()).or_default() += 1;
        }
        if state.full {
            return Err(full());
        }
        let Some(order) = state.order.as_mut().filter(|o| o.point == point) else {
            return Ok(Fate::Go);
        };
        order.left -= 1;
        if order.left > 0 {
            return Ok(Fate::Go);
        }
        let act = order.act;
        state.order = None;
        match act {
            Act::Kill => die(),
            Act::Eio => Err(io::Error::from_raw_os_error(libc::EIO)),
            Act::Enospc => {
                state.full = true;
                Err(full())
            }
            Act::Short => Ok(Fate::Short(|| io::Error::from_raw_os_error(libc::ENOSPC))),
            Act::Torn => Ok(Fate::Short(|| die())),
        }
    }

    /// The file's name, or what it is where the name is another every time.
    fn name(path: &Path) -> String {
        let last = |path: &Path| {
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        match (path.parent().map(last).as_deref(), last(path)) {
            (Some("students"), name) if name.starts_with(".tmp-") => "unfinished student".into(),
            (Some("students"), _) => "student".into(),
            (_, name) => name,
        }
    }

    fn full() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOSPC)
    }

    fn die() -> ! {
        // SAFETY: a signal to this process, which does not come back from it.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        unreachable!("SIGKILL was survived")
    }
}
