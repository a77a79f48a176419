//! Which status an error of the other crates becomes.

use locum_core::locum::Error;
use locum_core::store::StoreError;
use locum_lua::PolicyError;

use crate::status::*;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::NotFound { .. } => E_NOT_FOUND,
            Error::Argument(_) | Error::Format(_) => E_ARGUMENT,
            Error::Limit { .. } | Error::Store(StoreError::TooLarge { .. }) => E_LIMIT,
            Error::NoModel
            | Error::Model(_)
            | Error::Chat(_)
            | Error::Registry(_)
            | Error::Engine(_)
            | Error::Train(_) => E_MODEL,
            Error::Busy(_) | Error::Store(StoreError::Busy { .. }) => E_BUSY,
            Error::Store(StoreError::Timeout { .. }) => E_TIMEOUT,
            Error::Store(StoreError::Corrupt { .. }) => E_CORRUPT,
            Error::Teacher { .. } => TEACHER,
            Error::Closed => E_CLOSED,
            Error::Cancelled => E_CANCELLED,
            _ => E_STORE,
        };
        Failure {
            status,
            os_code: os_code(&error),
            message: error.to_string(),
        }
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        let status = match &error {
            PolicyError::TooLarge { .. } => E_LIMIT,
            PolicyError::State { .. } => E_MEMORY,
            _ => E_POLICY,
        };
        Failure {
            status,
            os_code: os_code(&error),
            message: error.to_string(),
        }
    }
}

/// The operating system's number behind an error, if one of its causes has it.
fn os_code(error: &(dyn std::error::Error + 'static)) -> i32 {
    std::iter::successors(Some(error), |e| e.source())
        .filter_map(|e| e.downcast_ref::<std::io::Error>()?.raw_os_error())
        .next()
        .unwrap_or(0)
}
