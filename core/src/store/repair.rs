//! Puts right what can be put right without a guess: rows that fit nothing, and counts that can be counted again.

use std::path::Path;

use rusqlite::TransactionBehavior;

use super::sessions::{is_free, locks};
use super::{check, database, Store, StoreError, StoreOptions};

/// Statements in their order: steps go before what hangs on them.
const STATEMENTS: &[&str] = &[
    "DELETE FROM steps WHERE episode NOT IN (SELECT episode FROM episodes)",
    "DELETE FROM tool_calls AS t WHERE NOT EXISTS (SELECT 1 FROM steps s WHERE s.episode=t.episode AND s.step=t.step)",
    "DELETE FROM observations AS t WHERE NOT EXISTS (SELECT 1 FROM steps s WHERE s.episode=t.episode AND s.step=t.step)",
    "DELETE FROM outcomes WHERE episode NOT IN (SELECT episode FROM episodes)",
    // A step that is recorded has its count in the same commit, so counting again is right at any time.
    "UPDATE episodes AS e SET (n_steps, n_agent, n_teacher, n_student) = (SELECT count(*), coalesce(sum(source='agent'),0),
       coalesce(sum(source='agent' AND actor='teacher'),0), coalesce(sum(source='agent' AND actor='student'),0)
       FROM steps s WHERE s.episode=e.episode)",
    "UPDATE episodes AS e SET status=(SELECT status FROM outcomes o WHERE o.episode=e.episode ORDER BY n DESC LIMIT 1)",
    "UPDATE episodes AS e SET incomplete=1, incomplete_why=concat_ws(char(10), incomplete_why, 'a step is missing')
       WHERE incomplete=0 AND source_format='live' AND
         n_steps IS NOT (SELECT coalesce(max(step), 0) FROM steps s WHERE s.episode=e.episode)",
    "UPDATE episodes SET closed=1, incomplete=1, recorder=NULL, status=coalesce(status, 'aborted'),
       incomplete_why=concat_ws(char(10), incomplete_why, 'nobody was recording it any more')
       WHERE closed=0 AND (recorder IS NULL OR recorder NOT IN (SELECT session FROM sessions))",
];

/// Removes what fits nothing and counts again what can be counted, in one commit; opening the store does the rest. Does not touch a
/// damaged file, nor an episode that cannot be read.
///
/// # Errors
/// A store that cannot be opened, or a disk that refuses; then nothing was changed.
pub fn repair(dir: &Path) -> Result<(), StoreError> {
    let path = dir.join(database::DATABASE);
    if !path.exists() {
        return Err(StoreError::Missing { path });
    }
    // Closes the episodes of processes that are gone.
    Store::open(dir, StoreOptions::default())?.close(std::time::Duration::from_secs(30))?;
    let damaged = check::is_damaged(dir)?;
    if let Some(detail) = damaged {
        return Err(StoreError::Corrupt { path, detail });
    }
    let said = |error| database::explain(&path, error);
    let mut db = database::open_writer(dir, &StoreOptions::default())?;
    let tx = db
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(said)?;
    for sql in STATEMENTS {
        tx.execute(sql, []).map_err(said)?;
    }
    let known: Vec<i64> = {
        let mut select = tx.prepare("SELECT session FROM sessions").map_err(said)?;
        let rows = select.query_map([], |row| row.get(0)).map_err(said)?;
        rows.collect::<Result<_, _>>().map_err(said)?
    };
    tx.commit().map_err(said)?;
    for (session, lock) in locks(dir) {
        if !known.contains(&session) && is_free(&lock) {
            let _ = std::fs::remove_file(lock);
        }
    }
    Ok(())
}
