//! Policy sources of any kind: each is a policy or an error, in bounded time. `LOCUM_FUZZ_CASES` asks for more.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use locum_core::limits::MAX_POLICY_BYTES;
use locum_core::policy::{Policy, RedactInfo, StepInfo};
use locum_lua::{LuaPolicy, PolicyError, PolicyOptions};

const SOURCES: [&str; 3] = [
    include_str!("../policies/default.lua"),
    include_str!("../policies/cautious.lua"),
    include_str!("../policies/private.lua"),
];

fn load(source: &str) -> Result<LuaPolicy, PolicyError> {
    let options = PolicyOptions {
        states: 1,
        selftest: false,
        ..PolicyOptions::default()
    };
    LuaPolicy::from_source(source, "fuzz.lua", options)
}

#[test]
fn a_changed_policy_is_a_policy_or_an_error() {
    let asked: usize = std::env::var("LOCUM_FUZZ_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut below = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n.max(1)
    };
    let nasty = [
        "while true do end",
        "\0",
        "[==[",
        "--[[",
        "\"",
        "(",
        "((((((((((((((((",
        "{{{{{{{{",
        "end",
        "function",
        "0x",
        "1e",
        "..",
        "...",
        "`{",
        "nil",
        "goto x",
        "setmetatable({},{})",
        "error()",
        "string.rep('x', 1e9)",
        "\u{feff}",
        "\u{1b}Lua",
        "local a <const> = 1",
    ];
    let (mut loaded, mut slowest) = (0, Duration::ZERO);
    let cases = 150 * asked;
    for case in 0..cases {
        let mut text = SOURCES[below(3)].as_bytes().to_vec();
        for _ in 0..1 + below(3) {
            let at = below(text.len());
            let to = (at + below(12)).min(text.len());
            match below(4) {
                0 => {
                    text.drain(at..to);
                }
                1 => text.truncate(at.max(1)),
                2 => {
                    text.splice(at..to, nasty[below(nasty.len())].bytes());
                }
                _ => text[at] = text[at].wrapping_add(1 + below(254) as u8),
            }
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let begin = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| match load(&text) {
            Ok(policy) => {
                policy.decide(&StepInfo::default());
                let _ = policy.redact(&RedactInfo {
                    content: "a@b.de 4111 1111 1111 1111".into(),
                    ..RedactInfo::default()
                });
                1
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                0
            }
        }));
        let took = begin.elapsed();
        loaded += done.unwrap_or_else(|_| panic!("case {case} panicked:\n{text}"));
        assert!(
            took < Duration::from_secs(20),
            "case {case} took {took:?}:\n{text}"
        );
        slowest = slowest.max(took);
    }
    println!(
        "{cases} changed policies, {loaded} loaded, the slowest {:.0} ms",
        slowest.as_secs_f64() * 1e3
    );
}

#[test]
fn a_source_above_the_limit_is_refused_unread() {
    let fits = format!("return {{}}{}", " ".repeat(MAX_POLICY_BYTES - 9));
    assert_eq!(fits.len(), 256 << 10);
    load(&fits).unwrap();
    let error = load(&(fits + " "))
        .err()
        .expect("it is too large")
        .to_string();
    assert_eq!(
        error,
        "fuzz.lua has 262145 bytes, the limit for a policy is 262144"
    );
}
