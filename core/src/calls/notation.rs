//! Writing and reading the values and names of the compact notation. Knows JSON and bare words, no schemas.

use serde_json::Value;

/// True if `word` can stand without quotes: letters, digits, `_`, `.`, `-`, and not itself a JSON value.
pub fn is_bare(word: &str) -> bool {
    !word.is_empty()
        && word
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && serde_json::from_str::<Value>(word).is_err()
}

/// True if `name` can stand before `=` without quotes.
pub fn is_key(name: &str) -> bool {
    name.bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Compact JSON. DEL is escaped too: the grammar does not admit it inside a string.
pub fn json(value: &Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// A key as it stands before `=`.
pub fn key(name: &str) -> String {
    if is_key(name) {
        name.to_string()
    } else {
        json(&Value::from(name))
    }
}

/// What was expected at a byte offset of a reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Unread {
    pub at: usize,
    pub expected: String,
}

/// Reads a reply from left to right.
pub struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(text: &'a str, at: usize) -> Self {
        Self { text, at }
    }

    pub fn text(&self) -> &'a str {
        self.text
    }

    pub fn at(&self) -> usize {
        self.at
    }

    pub fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub fn is_at_end(&self) -> bool {
        self.at == self.text.len()
    }

    pub fn fail<T>(&self, expected: impl Into<String>) -> Result<T, Unread> {
        Err(Unread {
            at: self.at,
            expected: expected.into(),
        })
    }

    /// Takes `literal` if it comes next.
    pub fn take(&mut self, literal: &str) -> bool {
        let found = self.rest().starts_with(literal);
        if found {
            self.at += literal.len();
        }
        found
    }

    pub fn expect(&mut self, literal: &str) -> Result<(), Unread> {
        if self.take(literal) {
            Ok(())
        } else {
            self.fail(format!("`{literal}`"))
        }
    }

    pub fn skip_spaces(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start_matches(' ').len();
    }

    /// The longest run of characters for which `is_part` holds; may be empty.
    pub fn run(&mut self, is_part: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// A parameter's name: a word, or a JSON string.
    pub fn key(&mut self) -> Result<String, Unread> {
        if self.rest().starts_with('"') {
            return match self.json()? {
                Value::String(name) => Ok(name),
                _ => self.fail("a parameter's name"),
            };
        }
        let name = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if name.is_empty() {
            return self.fail("a parameter's name");
        }
        Ok(name.to_string())
    }

    /// A value: JSON, or a bare word, which is a string.
    pub fn value(&mut self) -> Result<Value, Unread> {
        if self.rest().starts_with(['"', '{', '[']) {
            return self.json();
        }
        let start = self.at;
        let word = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+'));
        if let Ok(value) = serde_json::from_str(word) {
            return Ok(value);
        }
        if is_bare(word) {
            return Ok(Value::from(word));
        }
        self.at = start;
        self.fail("a value")
    }

    fn json(&mut self) -> Result<Value, Unread> {
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<Value>();
        match stream.next() {
            Some(Ok(value)) => {
                self.at += stream.byte_offset();
                Ok(value)
            }
            Some(Err(e)) => self.fail(format!("JSON ({e})")),
            None => self.fail("a value"),
        }
    }
}
