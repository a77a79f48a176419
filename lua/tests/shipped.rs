//! The policies that we ship: their own tests, and what they say through the trait.

use locum_core::policy::{
    GateVote, Policy, RedactInfo, ReplyInfo, Settings, StepInfo, StudentInfo, ToolInfo, Who,
    WorldInfo,
};
use locum_core::view::View;
use locum_lua::{check, LuaPolicy, PolicyError, PolicyOptions};

const DEFAULT: &str = include_str!("../policies/default.lua");
const CAUTIOUS: &str = include_str!("../policies/cautious.lua");
const PRIVATE: &str = include_str!("../policies/private.lua");

fn load(source: &str, name: &str) -> LuaPolicy {
    LuaPolicy::from_source(
        source,
        name,
        PolicyOptions {
            states: 1,
            ..Default::default()
        },
    )
    .unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn every_shipped_policy_passes_its_check_and_its_selftest_without_a_word() {
    for (source, name) in [
        (DEFAULT, "default.lua"),
        (CAUTIOUS, "cautious.lua"),
        (PRIVATE, "private.lua"),
    ] {
        let report = check(source, name);
        assert!(
            report.is_ok() && report.warnings.is_empty() && report.printed.is_empty(),
            "{report}"
        );
        assert_eq!(report.selftest, "passed");
        println!("{report}");
    }
}

/// A selftest that passes whatever the policy does would be worth nothing.
#[test]
fn the_selftests_fail_when_a_policy_is_broken() {
    let broken = [
        (DEFAULT, "step.novelty > M.max_novelty", "false"),
        (
            DEFAULT,
            "student.live_episodes >= M.trusted_after and success < M.min_live_success",
            "true",
        ),
        (DEFAULT, "world.new_successes < M.new_successes", "false"),
        (DEFAULT, "if not episode.teacher then", "if false then"),
        (
            DEFAULT,
            "report.held_out_exact < report.base_exact",
            "false",
        ),
        (
            DEFAULT,
            "live.episodes >= M.rollback_episodes and live",
            "live",
        ),
        (CAUTIOUS, "reply.min_prob < M.min_prob", "false"),
        (
            CAUTIOUS,
            "local name = string.lower(tool)",
            "local name = tool",
        ),
        (
            CAUTIOUS,
            "report.student_episodes < M.min_student_episodes",
            "false",
        ),
        (
            CAUTIOUS,
            "fast.drift > fast.max_drift * M.max",
            "fast.drift > M.max",
        ),
        (
            CAUTIOUS,
            "fast.loss_before + M.max_loss_rise",
            "fast.loss_before - M.max_loss_rise",
        ),
        (
            PRIVATE,
            "hide_digits(hide_emails(hide_keys(text.content)))",
            "hide_digits(hide_emails(text.content))",
        ),
        (
            PRIVATE,
            "hide_digits(hide_emails(hide_keys(text.content)))",
            "hide_digits(hide_keys(text.content))",
        ),
        (
            PRIVATE,
            "hide_digits(hide_emails(hide_keys(text.content)))",
            "hide_emails(hide_keys(text.content))",
        ),
        (PRIVATE, "#digits >= M.min_digits", "true"),
        (PRIVATE, "digits * 8 >= #word", "true"),
    ];
    for (source, from, to) in broken {
        assert_eq!(source.matches(from).count(), 1, "{from}");
        match LuaPolicy::from_source(
            &source.replace(from, to),
            "broken.lua",
            PolicyOptions {
                states: 1,
                ..Default::default()
            },
        ) {
            Err(PolicyError::SelfTest { message, .. }) => println!("{from}: {message}"),
            Err(other) => panic!("{from}: {other}"),
            Ok(_) => panic!("`{from}` became `{to}`, and the selftest did not notice"),
        }
    }
}

#[test]
fn default_lua_declares_the_built_in_view_and_settings() {
    let policy = LuaPolicy::default_policy().unwrap();
    assert_eq!(policy.view(), View::default());
    assert_eq!(policy.settings(), Settings::default());
    assert_eq!(policy.id().name, "default.lua");
    assert_eq!(policy.id().digest.len(), 64);
}

#[test]
fn default_lua_lets_an_offered_student_play_and_trains_it_every_fifty_successes() {
    let policy = load(DEFAULT, "default.lua");
    let mut step = StepInfo {
        stage: "canary".into(),
        student: Some(StudentInfo::default()),
        ..Default::default()
    };
    assert_eq!(policy.decide(&step).who, Who::Student);
    step.student = None;
    assert_eq!(policy.decide(&step).who, Who::Teacher);
    let mut world = WorldInfo {
        has_base: true,
        new_successes: 49,
        ..Default::default()
    };
    assert!(!policy.schedule(&world).now);
    world.new_successes = 50;
    assert!(policy.schedule(&world).now);
    assert!(policy.stats().iter().all(|hook| hook.failures == 0));
}

#[test]
fn cautious_lua_wants_more_evidence_than_default_lua() {
    let (cautious, plain) = (
        load(CAUTIOUS, "cautious.lua").settings().gate,
        Settings::default().gate,
    );
    assert!(
        cautious.margin < plain.margin
            && cautious.alpha < plain.alpha
            && cautious.min_exact > plain.min_exact
    );
    assert!(cautious.min_canary > plain.min_canary && cautious.canary_share < plain.canary_share);
    let policy = load(CAUTIOUS, "cautious.lua");
    let reply = ReplyInfo {
        text: "x".into(),
        min_prob: 0.4,
        ..Default::default()
    };
    assert_eq!(policy.accept(&reply).who, Who::Teacher);
    let refund = ToolInfo {
        name: "refund".into(),
        ..Default::default()
    };
    assert!(
        matches!(policy.allow_tool(&refund), locum_core::policy::Allow::No(why) if why.contains("refund"))
    );
    assert!(matches!(
        policy.gate(&Default::default()),
        GateVote::Promote(_)
    ));
}

/// The budget of `redact` is CPU time by size of content; a page of prose and one made of near-misses must both fit.
#[test]
fn private_lua_redacts_a_mebibyte_within_its_budget() {
    let policy = load(PRIVATE, "private.lua");
    let fill = |unit: &str| unit.repeat((1 << 20) / unit.len());
    let texts = [
        ("prose", fill("The quick brown fox, born 1984, wrote to fox@den.org about card 4111 1111 1111 1111. ")),
        ("one word", fill("a")),
        ("digits", fill("1")),
        ("near-miss addresses", fill("a@")),
        ("near-miss keys", fill("abcdefghijk-lmnop_qrstu ")),
        ("hexadecimal", fill("0123456789abcdef")),
        ("separators", fill("1 -.")),
    ];
    for (name, content) in texts {
        let begin = std::time::Instant::now();
        let result = policy.redact(&RedactInfo {
            role: "tool".into(),
            tool: None,
            content,
        });
        println!("{name:<20} {:>7.1} ms", begin.elapsed().as_secs_f64() * 1e3);
        assert!(result.is_ok(), "{name}: {result:?}");
    }
}
