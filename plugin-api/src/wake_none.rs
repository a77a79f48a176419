//! Where there is no event handle, nobody can be called.

use super::*;

pub struct Wake;

impl Wake {
    pub fn start(_: i64, _: WakeFn, _: *mut c_void, _: Option<DoneFn>) -> Result<Self, Failure> {
        Err(Failure::new(
            E_UNSUPPORTED,
            "there is no event handle on this platform",
        ))
    }
}
