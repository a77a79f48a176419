//! The objects behind the handles, and how an export finds them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use locum_core::episode::ToolSpec;
use locum_core::locum::{Call, EpisodeHandle, Locum};
use serde_json::Value;

use crate::event::Wake;
use crate::fork::{self, PerProcess};
use crate::guard::{Breaker, Frame};
use crate::handles::{Kind, Table};
use crate::status::{Failure, E_LIMIT, E_UNSUPPORTED};

/// Behind `locum`.
pub struct Instance {
    pub locum: Locum,
    pub read_only: bool,
    pub breaker: Arc<Breaker>,
    pub wake: Mutex<Option<Wake>>,
    /// From core's call numbers, which events carry, to handles, which hosts know. Locked from before a generation starts until
    /// its handle exists, so that even the event of a call that ends at once finds its handle.
    call_handles: Mutex<HashMap<u64, u64>>,
}

/// Behind `locum_episode`.
pub struct Episode {
    pub instance: Arc<Instance>,
    pub handle: EpisodeHandle,
    /// What the agent may call where a request does not say.
    pub tools: Vec<ToolSpec>,
    /// The messages recorded so far, for requests that bring none. Held while an export works on the episode.
    turn: Mutex<Vec<Value>>,
}

/// Behind `locum_call`.
pub struct Generation {
    pub instance: Arc<Instance>,
    pub call: Call,
}

/// Every live object of this process.
pub struct Objects {
    pub instances: Table<Instance>,
    pub episodes: Table<Episode>,
    pub calls: Table<Generation>,
}

static OBJECTS: PerProcess<Objects> = PerProcess::new(|| {
    let epoch = fork::epoch();
    Objects {
        instances: Table::new(Kind::Locum, epoch),
        episodes: Table::new(Kind::Episode, epoch),
        calls: Table::new(Kind::Call, epoch),
    }
});

/// The tables of this process.
pub fn objects() -> &'static Objects {
    OBJECTS.get()
}

impl Frame {
    /// The instance that a handle names; the export runs in it from here on.
    pub fn instance(&self, handle: u64) -> Result<Arc<Instance>, Failure> {
        let instance = objects().instances.get(handle)?;
        self.runs_in(&instance.breaker);
        Ok(instance)
    }

    /// The episode that a handle names.
    pub fn episode(&self, handle: u64) -> Result<Arc<Episode>, Failure> {
        let episode = objects().episodes.get(handle)?;
        self.runs_in(&episode.instance.breaker);
        Ok(episode)
    }

    /// The call that a handle names.
    pub fn call(&self, handle: u64) -> Result<Arc<Generation>, Failure> {
        let call = objects().calls.get(handle)?;
        self.runs_in(&call.instance.breaker);
        Ok(call)
    }
}

impl Episode {
    pub fn new(instance: Arc<Instance>, handle: EpisodeHandle, tools: Vec<ToolSpec>) -> Self {
        Self {
            instance,
            handle,
            tools,
            turn: Mutex::default(),
        }
    }

    /// Takes the episode for one export. Two at once is misuse, and refused rather than queued: a host that does so would
    /// get its steps in an order that nobody chose.
    pub fn turn(&self) -> Result<MutexGuard<'_, Vec<Value>>, Failure> {
        match self.turn.try_lock() {
            Ok(turn) => Ok(turn),
            // A panic has tripped the breaker already; the messages are only ever pushed to.
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => Err(Failure::misuse(
                "two threads use this episode at once; take turns",
            )),
        }
    }
}

impl Instance {
    pub fn new(locum: Locum, read_only: bool, breaker: Arc<Breaker>) -> Self {
        Self {
            locum,
            read_only,
            breaker,
            wake: Mutex::new(None),
            call_handles: Mutex::default(),
        }
    }

    /// The table of call handles. What a panic may have left in it is whole, since it is only inserted into and removed from.
    pub fn call_handles(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.call_handles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what would change the store where it was opened to look only.
    pub fn may_change(&self) -> Result<(), Failure> {
        if self.read_only {
            return Err(Failure::new(
                E_UNSUPPORTED,
                "the store was opened read-only",
            ));
        }
        Ok(())
    }
}

/// The failure of a full handle table.
pub fn too_many(what: &str) -> Failure {
    Failure::new(E_LIMIT, format!("too many {what} are open; give some back"))
}
