//! A connection that keeps its statements, so that the SQL of a step is parsed once and not for every step.
//!
//! rusqlite has such a cache behind a feature that brings another hash map into the build; this is all we need of it.

use std::cell::RefCell;

use rusqlite::{Connection, Params, Row, Statement};

/// A borrowed connection with the statements it has been asked for so far. Belongs to one thread.
pub struct Statements<'c> {
    db: &'c Connection,
    kept: RefCell<Vec<(&'static str, Statement<'c>)>>,
}

impl<'c> Statements<'c> {
    /// Starts with none.
    pub fn new(db: &'c Connection) -> Self {
        Self {
            db,
            kept: RefCell::new(Vec::new()),
        }
    }

    /// The connection.
    pub fn db(&self) -> &'c Connection {
        self.db
    }

    /// Runs a statement that returns no rows; gives the number of rows it changed.
    pub fn execute(&self, sql: &'static str, params: impl Params) -> rusqlite::Result<usize> {
        self.with(sql, |statement| statement.execute(params))
    }

    /// All rows of a query.
    pub fn all<T>(
        &self,
        sql: &'static str,
        params: impl Params,
        read: impl FnMut(&Row) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Vec<T>> {
        self.with(sql, |statement| {
            statement.query_map(params, read)?.collect()
        })
    }

    /// The first row of a query, if there is one.
    pub fn first<T>(
        &self,
        sql: &'static str,
        params: impl Params,
        read: impl FnOnce(&Row) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Option<T>> {
        self.with(sql, |statement| {
            let mut rows = statement.query(params)?;
            rows.next()?.map(read).transpose()
        })
    }

    fn with<T>(
        &self,
        sql: &'static str,
        run: impl FnOnce(&mut Statement<'c>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let mut kept = self.kept.borrow_mut();
        // A few dozen statements at most: walking them costs less than hashing the text.
        let at = match kept
            .iter()
            .position(|(known, _)| std::ptr::eq(*known, sql) || *known == sql)
        {
            Some(at) => at,
            None => {
                kept.push((sql, self.db.prepare(sql)?));
                kept.len() - 1
            }
        };
        run(&mut kept[at].1)
    }
}
