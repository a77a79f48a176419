use std::time::Instant;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::episode::{Content, Episode, Observation, Source, Step, TokenIds, ToolCall};

/// Joined at run time, so that no scanner of this repository takes the test for a leak.
fn join(parts: &[&str]) -> String {
    parts.concat()
}

#[track_caller]
fn finds(kind: Kind, secret: &str) {
    for (before, after) in [
        ("", ""),
        ("it is ", " now"),
        ("(", ")"),
        ("say \"", "\", so"),
        ("\n", "\n"),
        ("é ", " é"),
    ] {
        let mut text = format!("{before}{secret}{after}");
        let mut kinds = Vec::new();
        assert!(
            clean(&mut text, Detect::ALL, &mut kinds),
            "not found: {before}{secret}{after}"
        );
        assert!(!text.contains(secret), "still there: {text}");
        assert!(
            text.starts_with(before) && text.ends_with(after),
            "too much: {text}"
        );
        assert_eq!(kinds, [kind], "{text}");
        let once = text.clone();
        assert!(
            !clean(&mut text, Detect::ALL, &mut kinds),
            "{once} was changed again: {text}"
        );
    }
    let mut text = format!(" {secret} ");
    let off = Kind::ALL
        .into_iter()
        .fold(Detect::ALL, |set, other| match other == kind {
            true => set,
            false => set.without(other),
        });
    assert!(
        clean(&mut text, off, &mut Vec::new()),
        "{kind:?} alone does not find {secret}"
    );
}

#[track_caller]
fn keeps(text: &str) {
    let found = find(text, Detect::ALL);
    let what: Vec<_> = found
        .iter()
        .map(|f| (f.kind, &text[f.range.clone()]))
        .collect();
    assert!(what.is_empty(), "in {text:?}: {what:?}");
}

#[test]
fn keys_of_known_providers_are_found_by_their_beginning() {
    for parts in [
        &["AKIA", "IOSFODNN7EXAMPLE"][..],
        &["ghp_", "16C7e42F292c6912E7710c838347Ae178B4a"],
        &[
            "github_pat_",
            "11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ0123456789abcdef",
        ],
        &["glpat-", "x1y2z3a4b5c6d7e8f9g0"],
        &["sk-", "proj-abcDEF0123456789abcDEF"],
        &["sk-", "ant-api03-abcdefghij0123456789"],
        &["sk_", "live_4eC39HqLyjWDarjtT1zdp7dc"],
        &["xoxb-", "123456789012-abcdefghijkl"],
        &["AIza", "SyA1234567890abcdefghijklmnopqrstuv"],
        &["hf_", "abcdefghijklmnopqrstuvwxyz01234567"],
        &["npm_", "abcdefghijklmnopqrstuvwxyz0123456789"],
        &[
            "SG.",
            "abcdefghij0123456789AB.abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG",
        ],
        &["hvs.", "CAESIJ1234567890abcdefgh"],
        &["123456789", ":AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw9"],
        &[
            "dop_v1_",
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ],
    ] {
        finds(Kind::Key, &join(parts));
    }
}

#[test]
fn private_keys_tokens_headers_and_passwords_are_found() {
    let body = "MIIEpAIBAAKCAQEA7bq1\nabc+/=\n".repeat(8);
    let pem = |kind: &str| {
        join(&[
            "-----BEGIN ",
            kind,
            "PRIVATE KEY-----\n",
            &body,
            "-----END ",
            kind,
            "PRIVATE KEY-----",
        ])
    };
    for kind in ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "] {
        finds(Kind::PrivateKey, &pem(kind));
    }
    let jwt = join(&[
        "eyJ",
        "hbGciOiJIUzI1NiJ9.",
        "eyJ",
        "zdWIiOiIxMjM0In0.",
        "dozjgNryP4J3jVmNHl0w5N",
    ]);
    finds(Kind::Jwt, &jwt);
    for (header, token) in [
        ("Authorization: Bearer ", "mF9.B5f-4.1JqMabc012"),
        ("basic ", "dXNlcjpwYXNzd29yZDEyMw=="),
    ] {
        let mut text = join(&[header, token]);
        let mut kinds = Vec::new();
        assert!(clean(&mut text, Detect::ALL, &mut kinds));
        assert_eq!(
            (text.contains(token), text.starts_with(header)),
            (false, true),
            "{text}"
        );
    }
    for (before, secret, after) in [
        ("postgres://ada:", "hunter2!", "@db.example:5432/x"),
        ("https://user:", "p@ss", "@host/"),
        ("password=", "Tr0ub4dor", "&next=1"),
        ("\"api_key\": \"", "correct horse battery", "\","),
        ("\\\"client_secret\\\": \\\"", "x9-y8", "\\\"}"),
        (
            "AWS_SECRET_ACCESS_KEY=",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "\n",
        ),
        ("DB_PASSWORD: ", "Pa55", " "),
    ] {
        let mut text = join(&[before, secret, after]);
        let mut kinds = Vec::new();
        assert!(clean(&mut text, Detect::ALL, &mut kinds), "{text}");
        assert_eq!(kinds, [Kind::Password], "{text}");
        assert!(!text.contains(secret), "{text}");
        assert!(text.starts_with(before) && text.ends_with(after), "{text}");
        let once = text.clone();
        assert!(!clean(&mut text, Detect::ALL, &mut kinds), "{once}: {text}");
    }
}

#[test]
fn a_key_that_was_cut_off_is_hidden_to_the_end() {
    let mut text = join(&[
        "see -----BEGIN ",
        "PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0 and é",
    ]);
    clean(&mut text, Detect::ALL, &mut Vec::new());
    assert!(
        text.starts_with("see <private_key:") && text.ends_with('>'),
        "{text}"
    );
}

#[test]
fn cards_pass_the_check_digit_and_other_numbers_stay() {
    for card in [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5500-0055-5555-5559",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "3530111333300000",
        "30569309025904",
        "2221000000000009",
    ] {
        finds(Kind::Card, card);
    }
    for other in [
        "4111111111111112",
        "1700000000000",
        "order 1234567812345670",
        "3.141592653589793238",
        "0x4111111111111111",
        "41111111111111111111111",
        "4111 1111 1111 1111 1111 1111",
        "2024-01-02 10:20:30.123456",
        "id_4111111111111111",
    ] {
        keeps(other);
    }
}

#[test]
fn addresses_are_found_and_handles_are_not() {
    for address in [
        "ada@example.com",
        "ada.lovelace+notes@mail.example.co.uk",
        "A_B%c@X.ORG",
        "o'neil@example.ie",
    ] {
        finds(Kind::Email, address);
    }
    for other in [
        "meet me @ noon",
        "@home",
        "user@localhost",
        "git@github.com:a/b.git",
        "a @b.c",
        "x@y.z",
        "1@2.3",
    ] {
        keeps(other);
    }
}

#[test]
fn random_strings_are_found_and_digests_ids_names_and_paths_are_not() {
    for secret in [
        "wJ4lrXUtnF2MIK7mDeNGbPx8RfiCYe",
        "q7Xv2Lp9Zt4Kd8Wm1Rs6Yb3N",
        "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZg+/aB3",
    ] {
        finds(Kind::Entropy, secret);
    }
    for other in [
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "0123456789ABCDEF0123456789ABCDEF",
        "550e8400-e29b-41d4-a716-446655440000",
        "3F2504E0-4F89-41D3-9A0C-0305E82C3301",
        "call_aBcD1234efGH5678ijKL90mn",
        "chatcmpl-9XyZ12AbCdEfGhIjKlMnOpQr",
        "sha256-q7Xv2Lp9Zt4Kd8Wm1Rs6Yb3NaBcDeF0123456789",
        "handleUserLoginRequestWithTimeout2",
        "a_very_long_snake_case_name_2_of_3",
        "/usr/share/doc/libstdc++6/README.Debian",
        "https://example.org/a/long/path/With/Capitals/and/2026/numbers",
        "internationalisation-of-the-documentation",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "2026-01-02T10:20:30.123456Z",
        "sk-learn-compatible-estimator-of-ours",
        "the bearer of good news is a basic internationalisation",
        "password: required, secret=none, api_key: <your key here>",
        "MIT-licensed, UTF-8, x86_64-unknown-linux-gnu, bf16",
    ] {
        keeps(other);
    }
    // Of strings that were drawn at random few pass for something else.
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut state = 7u64;
    let mut draw = |n: usize| -> String {
        let one = |state: &mut u64| {
            *state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            letters[(*state >> 33) as usize % letters.len()] as char
        };
        (0..n).map(|_| one(&mut state)).collect()
    };
    for (length, least) in [(24, 930), (32, 980), (40, 990)] {
        let words: Vec<String> = (0..1000).map(|_| draw(length)).collect();
        let hit = words
            .iter()
            .filter(|w| !find(w, Detect::ALL).is_empty())
            .count();
        println!("random strings of {length} characters: {hit} of 1000 found");
        assert!(hit >= least, "{hit} of 1000 of {length} characters");
    }
    // A picture inside a message is a file, not a word.
    keeps(&format!(
        "data:image/png;base64,{}",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ".repeat(40)
    ));
}

#[test]
fn detectors_are_switched_off_by_kind() {
    let text = "ada@example.com pays with 4111111111111111";
    assert_eq!(find(text, Detect::ALL).len(), 2);
    let off: Detect = "-email".parse().unwrap();
    assert_eq!(
        find(text, off).iter().map(|f| f.kind).collect::<Vec<_>>(),
        [Kind::Card]
    );
    assert!(find(text, "none".parse().unwrap()).is_empty());
    assert_eq!(
        " -email, -card".parse::<Detect>().unwrap().to_string(),
        "-card,-email"
    );
    assert_eq!(
        (Detect::ALL.to_string(), Detect::NONE.to_string()),
        ("all".into(), "none".into())
    );
    for bad in ["email", "-mail", "-", "all,-email"] {
        assert!(bad.parse::<Detect>().is_err(), "{bad}");
    }
}

#[test]
fn two_addresses_stay_two_and_one_stays_one() {
    let mut text = "a@x.org b@x.org A@x.org".to_owned();
    clean(&mut text, Detect::ALL, &mut Vec::new());
    let marks: Vec<&str> = text.split(' ').collect();
    assert_eq!(
        (marks[0] == marks[1], marks[0] == marks[2]),
        (false, true),
        "{text}"
    );
}

#[test]
fn every_text_of_an_episode_is_cleaned() {
    let secret = "ada@example.com";
    let text = || format!("to {secret}");
    let call = ToolCall {
        id: text(),
        name: text(),
        arguments: json!({"to": [text()], secret: 1, "password": "x", "n": 4111111111111111u64}),
        arguments_raw: Some(format!("{{\"to\":[\"{secret}\"]}}")),
        extra: json!({"x": text()}).as_object().unwrap().clone(),
    };
    let mut step = Step {
        source: Source::Agent,
        model: Some(text()),
        message: Some(Content::Parts(vec![
            json!({"type": "text", "text": text()}),
        ])),
        reasoning: Some(text()),
        tool_calls: vec![call.clone()],
        observations: vec![Observation {
            call_id: Some(text()),
            content: Some(Content::Text(text())),
            ..Observation::default()
        }],
        token_ids: Some(TokenIds::default()),
        ..Step::default()
    };
    step.extra = call.extra.clone();
    step.counterfactual = Some(crate::episode::Counterfactual {
        tool_calls: vec![call],
        message: Some(text()),
        ..Default::default()
    });
    let mut episode = Episode {
        session_id: Some(text()),
        steps: vec![step],
        ..Episode::default()
    };
    episode.task.id = text();
    episode.task.instruction = text();
    episode.task.group_key = Some(text());
    episode.tools = vec![crate::episode::ToolSpec {
        description: text(),
        parameters: json!({"default": text()}),
        ..Default::default()
    }];
    episode.outcome = Some(crate::episode::Outcome {
        reason: Some(text()),
        tags: vec![text()],
        criteria: vec![crate::episode::Criterion {
            evidence: text(),
            ..Default::default()
        }],
        ..Default::default()
    });
    episode.extra = json!({"a": {"b": [text()]}}).as_object().unwrap().clone();
    clean_episode(&mut episode, &mut Cleaner::new(Detect::ALL));
    let printed = serde_json::to_string(&episode).unwrap();
    assert!(
        !printed.contains("ada") && !printed.contains("4111"),
        "{printed}"
    );
    assert!(printed.contains("\"password\":\"<password:"), "{printed}");
    assert!(episode.steps[0].token_ids.is_none());
    let mut kinds = episode.provenance.redactions.clone();
    kinds.sort();
    assert_eq!(kinds, ["card", "email", "password"]);
    let cleaned = episode.clone();
    clean_episode(&mut episode, &mut Cleaner::new(Detect::ALL));
    assert_eq!(
        serde_json::to_string(&episode).unwrap(),
        serde_json::to_string(&cleaned).unwrap()
    );
}

/// A text made to be looked at again and again costs no more a byte than a harmless one: twice the text, about twice the time.
#[test]
fn time_is_linear_in_hostile_texts() {
    let units = [
        "@",
        "a@",
        "a@b.",
        "4",
        "4 ",
        "4-",
        "://",
        "://a:",
        "://a:b@",
        "-----BEGIN ",
        "-----BEGIN PRIVATE KEY",
        "eyJ",
        "eyJ.",
        "eyJaaaaaaaaaa.",
        "bearer ",
        "password=",
        "password:\"",
        "=",
        ":",
        "a1B2",
        "a1B2/",
        "+/=",
        "ghp_",
        "sk-",
        "SG.",
        "\\\"",
        "-",
        "_",
        "aA1=",
        "AKIA",
        "é",
        "\u{200b}",
    ];
    let time = |text: &str| {
        let begin = Instant::now();
        let n = find(text, Detect::ALL).len();
        (begin.elapsed(), n)
    };
    for unit in units {
        let small = unit.repeat((64 << 10) / unit.len());
        let large = unit.repeat((1 << 20) / unit.len());
        // The best of five: a busy machine interrupts some.
        let best = |text: &str| (0..5).map(|_| time(text).0).min().unwrap();
        let (fast, slow) = (best(&small), best(&large));
        // Sixteen times the text; a square would be 256 times the time.
        let most = fast * 80 + std::time::Duration::from_millis(40);
        assert!(
            slow < most,
            "{unit:?}: {fast:?} for 64 KiB, {slow:?} for 1 MiB"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    /// Whatever comes: no panic, ranges on character boundaries, and what was cleaned once is clean.
    #[test]
    fn any_text_is_cleaned_once_and_for_all(text in hostile()) {
        let found = find(&text, Detect::ALL);
        for pair in found.windows(2) {
            prop_assert!(pair[0].range.end <= pair[1].range.start);
        }
        for f in &found {
            prop_assert!(text.is_char_boundary(f.range.start) && text.is_char_boundary(f.range.end));
        }
        let mut once = text.clone();
        clean(&mut once, Detect::ALL, &mut Vec::new());
        let secrets: Vec<String> = found.iter().map(|f| text[f.range.clone()].to_owned()).filter(|s| s.len() > 12).collect();
        // Each pass hides at least what the one before hid, and it comes to an end.
        let mut again = once.clone();
        for _ in 0..3 {
            clean(&mut again, Detect::ALL, &mut Vec::new());
        }
        let mut last = again.clone();
        prop_assert!(!clean(&mut last, Detect::ALL, &mut Vec::new()), "{} -> {}", again, last);
        for secret in secrets {
            prop_assert!(!again.contains(&secret) || text.matches(&secret).count() > 1, "{}", secret);
        }
    }
}

/// `LOCUM_FUZZ_CASES` asks for a longer run.
fn cases() -> u32 {
    std::env::var("LOCUM_FUZZ_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(256)
}

fn hostile() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[a-zA-Z0-9_+/=-]{0,60}",
        "[0-9 -]{0,30}",
        "\\PC{0,20}",
        prop::sample::select(vec![
            "@",
            "://",
            "-----BEGIN PRIVATE KEY-----",
            "-----END PRIVATE KEY-----",
            "eyJ",
            ".",
            "Bearer ",
            "password=",
            "\"api_key\": \"",
            "ghp_",
            "sk-",
            "AKIA",
            ":",
            "=",
            "\"",
            "\\",
            "\n",
            "é",
            "\0",
            "ada@example.com",
            "4111111111111111",
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

/// `cargo test --release -p locum-core measure_the_detectors -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_the_detectors() {
    let prose = "The customer asked for an invoice of 1,499.50 on 2026-01-02; see order_4711 at https://example.org/orders/4711?page=2. ";
    let result = r#"{"id": "9f86d081884c7d659a2feaa0c55ad015", "name": "Ada", "tags": ["a", "b"], "total": 1499.5, "path": "/srv/data/x_1.json"}"#;
    let secrets = "ada@example.com 4111 1111 1111 1111 api_key=Tr0ub4dor ";
    for (name, unit) in [("prose", prose), ("JSON", result), ("secrets", secrets)] {
        let text = unit.repeat(2048 / unit.len() + 1);
        let n = 20_000;
        let begin = Instant::now();
        let found: usize = (0..n).map(|_| find(&text, Detect::ALL).len()).sum();
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "{name}: {:.1} µs for {} bytes, {:.0} MB/s, {} found",
            seconds * 1e6 / n as f64,
            text.len(),
            (text.len() * n) as f64 / seconds / 1e6,
            found / n
        );
    }
}

#[test]
fn what_a_mark_uncovers_is_found_too() {
    // The address has no end before the key behind it is gone.
    let mut text =
        String::from("mal abcdef.orb@exampleAKIA.eAKIA.xK9dLqeyJxK9dLqeyJzdWIiOpwdI1vpmb92k x");
    let mut kinds = Vec::new();
    assert!(clean(&mut text, Detect::ALL, &mut kinds));
    assert_eq!(kinds, [Kind::Entropy, Kind::Email]);
    assert!(!text.contains("abcdef"), "{text}");
    let once = text.clone();
    assert!(!clean(&mut text, Detect::ALL, &mut kinds));
    assert_eq!(text, once);
}
