//! Reads JSON text exactly: numbers come back as the very float that was printed, depth has a limit,
//! and a refusal says what is wrong and where.
//!
//! `serde_json` in its default build may read a float one unit in the last place off, which would
//! make "the episode you load is the episode you recorded" untrue for scores and costs.

use serde_json::{Map, Number, Value};

/// Why a text is not JSON that we take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem} at byte {at}")]
pub struct JsonError {
    /// Offset of the first byte that cannot be read.
    pub at: usize,
    /// What is wrong there, in words.
    pub problem: String,
}

/// Parses one JSON value that fills `text` (white space around it is allowed).
///
/// Strings may hold `\u0000`; a lone surrogate, invalid UTF-8 and nesting deeper than `max_depth`
/// are refused. Of two equal keys the later wins, as in `serde_json`.
pub fn parse(text: &[u8], max_depth: usize) -> Result<Value, JsonError> {
    let mut reader = Reader {
        text,
        at: 0,
        max_depth,
    };
    let value = reader.value(0)?;
    reader.space();
    match reader.at == text.len() {
        true => Ok(value),
        false => Err(reader.fail("text after the end of the value")),
    }
}

/// Prints a value compactly; the opposite of [`parse`].
pub fn print(value: &Value) -> String {
    value.to_string()
}

/// Byte ranges of the elements of the array, or of the keys and values of the object, that fills `text`.
///
/// Only brackets and strings are looked at, so a bad element does not hide the others.
pub fn elements(text: &[u8]) -> Result<Vec<Element>, JsonError> {
    let mut reader = Reader {
        text,
        at: 0,
        max_depth: 0,
    };
    reader.space();
    let close = match reader.peek() {
        Some(b'[') => b']',
        Some(b'{') => b'}',
        _ => return Err(reader.fail("an array or an object is expected")),
    };
    reader.at += 1;
    let mut found = Vec::new();
    loop {
        reader.space();
        if reader.peek() == Some(close) && found.is_empty() {
            break;
        }
        let key = match close {
            b'}' => {
                let from = reader.at;
                reader.skip_string()?;
                let key = from..reader.at;
                reader.space();
                reader.expect(b':')?;
                reader.space();
                Some(key)
            }
            _ => None,
        };
        let from = reader.at;
        reader.skip_value()?;
        let mut to = reader.at;
        while to > from && text[to - 1].is_ascii_whitespace() {
            to -= 1;
        }
        if to == from {
            return Err(reader.fail("a value is expected"));
        }
        found.push(Element {
            key,
            value: from..to,
        });
        match reader.peek() {
            Some(b',') => reader.at += 1,
            Some(byte) if byte == close => break,
            _ => return Err(reader.fail("a comma or the closing bracket is expected")),
        }
    }
    reader.at += 1;
    reader.space();
    match reader.at == text.len() {
        true => Ok(found),
        false => Err(reader.fail("text after the end of the value")),
    }
}

/// Where one element stands in the text; `key` includes its quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    pub key: Option<std::ops::Range<usize>>,
    pub value: std::ops::Range<usize>,
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    max_depth: usize,
}

impl Reader<'_> {
    fn fail(&self, problem: impl Into<String>) -> JsonError {
        JsonError {
            at: self.at,
            problem: problem.into(),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(self.fail(match self.peek() {
                None => "the text ends too early".to_string(),
                Some(_) => format!("{:?} is expected", byte as char),
            }));
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.space();
        match self.peek() {
            None => Err(self.fail("the text ends too early")),
            Some(b'{') => self.object(depth + 1),
            Some(b'[') => self.array(depth + 1),
            Some(b'"') => Ok(Value::String(self.string()?)),
            Some(b't') => self.word("true", Value::Bool(true)),
            Some(b'f') => self.word("false", Value::Bool(false)),
            Some(b'n') => self.word("null", Value::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(0) => Err(self.fail("a raw NUL byte")),
            Some(_) => Err(self.fail("a value is expected")),
        }
    }

    fn deeper(&self, depth: usize) -> Result<(), JsonError> {
        match depth > self.max_depth {
            true => Err(self.fail(format!("nested deeper than {} levels", self.max_depth))),
            false => Ok(()),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.deeper(depth)?;
        self.at += 1;
        let mut map = Map::new();
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(map));
        }
        loop {
            self.space();
            let key = self.string()?;
            self.space();
            self.expect(b':')?;
            let value = self.value(depth)?;
            map.insert(key, value);
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => break,
                None => return Err(self.fail("the text ends too early")),
                Some(_) => return Err(self.fail("a comma or '}' is expected")),
            }
        }
        self.at += 1;
        Ok(Value::Object(map))
    }

    fn array(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.deeper(depth)?;
        self.at += 1;
        let mut list = Vec::new();
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value(depth)?);
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => break,
                None => return Err(self.fail("the text ends too early")),
                Some(_) => return Err(self.fail("a comma or ']' is expected")),
            }
        }
        self.at += 1;
        Ok(Value::Array(list))
    }

    fn word(&mut self, word: &str, value: Value) -> Result<Value, JsonError> {
        if !self.text[self.at..].starts_with(word.as_bytes()) {
            return Err(self.fail("a value is expected"));
        }
        self.at += word.len();
        Ok(value)
    }

    fn number(&mut self) -> Result<Value, JsonError> {
        let from = self.at;
        let digits = |reader: &mut Self| {
            let start = reader.at;
            while matches!(reader.peek(), Some(b'0'..=b'9')) {
                reader.at += 1;
            }
            reader.at - start
        };
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let leading_zero = self.peek() == Some(b'0');
        let whole = digits(self);
        if whole == 0 || (leading_zero && whole > 1) {
            return Err(self.fail("not a number"));
        }
        let mut integer = true;
        if self.peek() == Some(b'.') {
            self.at += 1;
            integer = false;
            if digits(self) == 0 {
                return Err(self.fail("not a number"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            integer = false;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if digits(self) == 0 {
                return Err(self.fail("not a number"));
            }
        }
        let text =
            std::str::from_utf8(&self.text[from..self.at]).expect("digits and signs are ASCII");
        // "-0" is the float minus zero, as in `serde_json`; an integer would lose the sign.
        if integer && text != "-0" {
            if let Ok(number) = text.parse::<u64>() {
                return Ok(number.into());
            }
            if let Ok(number) = text.parse::<i64>() {
                return Ok(number.into());
            }
        }
        let float: f64 = text.parse().map_err(|_| self.fail("not a number"))?;
        match Number::from_f64(float) {
            Some(number) => Ok(Value::Number(number)),
            None => Err(self.fail("a number out of range")),
        }
    }

    fn string(&mut self) -> Result<String, JsonError> {
        self.expect(b'"')?;
        let mut bytes = Vec::new();
        loop {
            let from = self.at;
            while !matches!(self.peek(), None | Some(b'"' | b'\\' | 0..=0x1f)) {
                self.at += 1;
            }
            // Only ASCII ends a run, so a run never cuts a character in two.
            if let Err(error) = std::str::from_utf8(&self.text[from..self.at]) {
                self.at = from + error.valid_up_to();
                return Err(self.fail("invalid UTF-8"));
            }
            bytes.extend_from_slice(&self.text[from..self.at]);
            match self.peek() {
                None => return Err(self.fail("a string without its closing quote")),
                Some(b'"') => break,
                Some(b'\\') => self.escape(&mut bytes)?,
                Some(0) => return Err(self.fail("a raw NUL byte")),
                Some(_) => return Err(self.fail("a raw control character in a string")),
            }
        }
        self.at += 1;
        Ok(String::from_utf8(bytes).expect("every run was checked"))
    }

    fn escape(&mut self, bytes: &mut Vec<u8>) -> Result<(), JsonError> {
        let start = self.at;
        self.at += 1;
        let plain = match self.peek() {
            Some(b'"') => b'"',
            Some(b'\\') => b'\\',
            Some(b'/') => b'/',
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                self.at += 1;
                let unit = self.hex4()?;
                let code = match unit {
                    0xD800..=0xDBFF => {
                        if !self.text[self.at..].starts_with(b"\\u") {
                            return Err(JsonError {
                                at: start,
                                problem: "a lone surrogate".into(),
                            });
                        }
                        self.at += 2;
                        let low = self.hex4()?;
                        if !(0xDC00..=0xDFFF).contains(&low) {
                            return Err(JsonError {
                                at: start,
                                problem: "a lone surrogate".into(),
                            });
                        }
                        0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
                    }
                    0xDC00..=0xDFFF => {
                        return Err(JsonError {
                            at: start,
                            problem: "a lone surrogate".into(),
                        })
                    }
                    unit => unit,
                };
                let character = char::from_u32(code).expect("surrogates were paired above");
                bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.fail("an unknown escape")),
        };
        bytes.push(plain);
        self.at += 1;
        Ok(())
    }

    fn hex4(&mut self) -> Result<u32, JsonError> {
        let digits = self
            .text
            .get(self.at..self.at + 4)
            .filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let Some(digits) = digits else {
            return Err(self.fail("four hexadecimal digits are expected"));
        };
        self.at += 4;
        Ok(
            u32::from_str_radix(std::str::from_utf8(digits).expect("ASCII"), 16)
                .expect("hexadecimal"),
        )
    }

    /// Moves past a string without reading it.
    fn skip_string(&mut self) -> Result<(), JsonError> {
        self.expect(b'"')?;
        loop {
            match self.peek() {
                None => return Err(self.fail("a string without its closing quote")),
                Some(b'"') => break,
                Some(b'\\') => self.at += 2,
                Some(_) => self.at += 1,
            }
        }
        self.at += 1;
        Ok(())
    }

    /// Moves to the comma or bracket that ends the value which begins here.
    fn skip_value(&mut self) -> Result<(), JsonError> {
        let mut depth = 0usize;
        loop {
            match self.peek() {
                None => return Err(self.fail("the text ends too early")),
                Some(b'"') => {
                    self.skip_string()?;
                    continue;
                }
                Some(b'{' | b'[') => depth += 1,
                Some(b'}' | b']') if depth == 0 => return Ok(()),
                Some(b'}' | b']') => depth -= 1,
                Some(b',') if depth == 0 => return Ok(()),
                Some(_) => {}
            }
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_come_back_bit_for_bit() {
        for text in [
            "0.0035475000000000003",
            "123456789012345680.0",
            "5e-324",
            "-0.0",
            "1.7976931348623157e308",
        ] {
            let expected: f64 = text.parse().unwrap();
            let value = parse(text.as_bytes(), 4).unwrap();
            assert_eq!(
                value.as_f64().unwrap().to_bits(),
                expected.to_bits(),
                "{text}"
            );
            assert_eq!(
                parse(print(&value).as_bytes(), 4)
                    .unwrap()
                    .as_f64()
                    .unwrap()
                    .to_bits(),
                expected.to_bits()
            );
        }
    }

    #[test]
    fn what_serde_json_reads_is_read_the_same() {
        for text in [
            r#" {"a":[1,-2,3.5,true,false,null,"x\n\"\u00e9\ud83d\ude00\u0000"],"b":{},"c":[]} "#,
            "18446744073709551615",
            "-9223372036854775808",
            "[[[]]]",
            r#"{"a":1,"a":2}"#,
        ] {
            assert_eq!(
                parse(text.as_bytes(), 8).unwrap(),
                serde_json::from_str::<Value>(text).unwrap(),
                "{text}"
            );
        }
    }

    #[test]
    fn bad_text_is_refused_with_what_and_where() {
        let check = |text: &[u8], problem: &str| {
            let error = parse(text, 4).unwrap_err();
            assert!(
                error.problem.contains(problem),
                "{:?}: {error}",
                String::from_utf8_lossy(text)
            );
        };
        check(br#"{"a":"\ud800"}"#, "lone surrogate");
        check(br#"{"a":"\udc00x"}"#, "lone surrogate");
        check(br#"{"a":"\ud800\u0041"}"#, "lone surrogate");
        check(b"\"a\xffb\"", "invalid UTF-8");
        check(b"\"a\0b\"", "raw NUL");
        check(b"[[[[[1]]]]]", "deeper than 4");
        check(b"[1,]", "value is expected");
        check(b"{\"a\" 1}", "':' is expected");
        check(b"01", "not a number");
        check(b"1e999", "out of range");
        check(b"tru", "value is expected");
        check(b"\"abc", "closing quote");
        check(b"", "ends too early");
        check(b"1 2", "after the end");
        check(b"\"\\u12\"", "four hexadecimal");
    }

    #[test]
    fn elements_are_found_even_beside_a_bad_one() {
        let text = br#" [ {"a":"]"} , {"b":"\ud800"}, 3 ] "#;
        let found = elements(text).unwrap();
        let parts: Vec<&[u8]> = found.iter().map(|e| &text[e.value.clone()]).collect();
        assert_eq!(
            parts,
            [&br#"{"a":"]"}"#[..], &br#"{"b":"\ud800"}"#[..], b"3"]
        );
        let text = br#"{"0":{"x":1},"1":[2]}"#;
        let found = elements(text).unwrap();
        assert_eq!(
            parse(&text[found[1].key.clone().unwrap()], 1).unwrap(),
            json!("1")
        );
        assert_eq!(&text[found[1].value.clone()], b"[2]");
        assert!(elements(b"[]").unwrap().is_empty());
        assert!(elements(b"[1").is_err());
        assert!(elements(b"[,]").is_err());
        assert!(elements(b"[1]]").is_err());
    }
}
