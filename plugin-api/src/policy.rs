//! Group 7 of `locum.h`: the policy.

use locum_core::limits::MAX_POLICY_BYTES;

use crate::guard::guard;
use crate::input::{borrow_bytes, name as read_name};
use crate::life::compile;
use crate::output::LocumError;
use crate::status::{Failure, OK};
use locum_core::threads::SignalsBlocked;

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_policy_load(
    handle: u64,
    source: *const u8,
    source_len: usize,
    name: *const u8,
    name_len: usize,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_policy_load", error, |frame| {
            let instance = frame.instance(handle)?;
            instance.may_change()?;
            let source = borrow_bytes("source", source, source_len, MAX_POLICY_BYTES)?;
            let source = std::str::from_utf8(source)
                .map_err(|_| Failure::argument("source is not UTF-8"))?;
            let name = match read_name("name", name, name_len)? {
                "" => "policy",
                name => name,
            };
            let _signals = SignalsBlocked::new();
            instance.locum.set_policy(compile(source, name)?)?;
            Ok(OK)
        })
    }
}
