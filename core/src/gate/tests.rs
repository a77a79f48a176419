use std::collections::BTreeMap;

use super::*;
use crate::policy::GateSettings;

/// Simulated canaries a claim.
const RUNS: usize = 10_000;

/// SplitMix64 (G. Steele, D. Lea, C. Flood, 2014): the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
    fn hit(&mut self, chance: f64) -> bool {
        self.next() < chance
    }
}

fn outcome(arm: Arm, task: &str, domain: &str, success: bool, at_ms: u64) -> LiveOutcome {
    LiveOutcome {
        arm,
        task: task.into(),
        domain: domain.into(),
        success,
        at_ms,
        integrity_ok: true,
        invalid_calls: 0,
    }
}

fn settings(margin: f64) -> GateSettings {
    GateSettings {
        margin,
        alpha: 0.05,
        min_canary: 10,
        max_canary: 150,
        ..GateSettings::default()
    }
}

struct Simulated {
    promoted: usize,
    rejected: usize,
    /// Student episodes until the promotion, mean over promoted runs.
    mean_episodes: f64,
}

/// Runs canaries in which each episode goes to the student with `settings.canary_share`, asking for a ruling after each.
fn simulate(runs: usize, settings: &GateSettings, teacher: f64, student: f64) -> Simulated {
    let mut random = Random(7);
    let mut result = Simulated {
        promoted: 0,
        rejected: 0,
        mean_episodes: 0.0,
    };
    for _ in 0..runs {
        let mut test = CanaryTest::new(settings);
        let mut played = 0;
        for at in 0.. {
            let student_plays = random.hit(settings.canary_share);
            played += usize::from(student_plays);
            let (arm, chance) = if student_plays {
                (Arm::Student, student)
            } else {
                (Arm::Teacher, teacher)
            };
            test.push(&outcome(arm, "", "grid", random.hit(chance), at));
            match test.ruling().decision {
                GateDecision::Wait => {}
                GateDecision::Pass => {
                    result.promoted += 1;
                    result.mean_episodes += played as f64;
                    break;
                }
                GateDecision::Reject => {
                    result.rejected += 1;
                    break;
                }
                GateDecision::Hold => break,
            }
        }
    }
    result.mean_episodes /= result.promoted.max(1) as f64;
    result
}

#[test]
fn at_the_margin_no_more_than_alpha_are_promoted() {
    for (teacher, student) in [(0.6, 0.55), (0.27, 0.22), (0.95, 0.9)] {
        let run = simulate(RUNS, &settings(0.05), teacher, student);
        println!(
            "teacher {teacher}, student {student}, margin 0.05: promoted {:.4}",
            run.promoted as f64 / RUNS as f64
        );
        assert!(run.promoted as f64 <= 0.05 * RUNS as f64);
    }
}

#[test]
fn a_teacher_against_itself_is_promoted_no_more_often_than_alpha_at_margin_zero() {
    for rate in [0.27, 0.5, 0.9] {
        let run = simulate(RUNS, &settings(0.0), rate, rate);
        println!(
            "teacher {rate} against itself, margin 0: promoted {:.4}",
            run.promoted as f64 / RUNS as f64
        );
        assert!(run.promoted as f64 <= 0.05 * RUNS as f64);
    }
}

#[test]
fn a_broken_student_is_never_promoted() {
    for teacher in [0.03, 0.27, 0.9] {
        let run = simulate(RUNS, &settings(0.05), teacher, 0.0);
        println!(
            "teacher {teacher}, student 0: promoted {}, rejected {}",
            run.promoted, run.rejected
        );
        assert_eq!(run.promoted, 0);
    }
}

#[test]
fn a_clearly_better_student_is_promoted() {
    for (teacher, student, power, runs) in [
        (0.27, 0.47, 0.75, 1000),
        (0.27, 0.67, 0.99, 1000),
        (0.6, 0.8, 0.8, 1000),
    ] {
        let settings = GateSettings {
            max_canary: 400,
            ..settings(0.05)
        };
        let run = simulate(runs, &settings, teacher, student);
        let share = run.promoted as f64 / runs as f64;
        println!(
            "teacher {teacher}, student {student}: promoted {share:.3} after {:.0} of its episodes",
            run.mean_episodes
        );
        assert!(share >= power, "{share}");
    }
}

#[test]
fn pairing_by_task_finds_the_same_difference_with_fewer_episodes() {
    // Hard and easy tasks; the student solves what the teacher solves and half of the rest.
    let episodes_needed = |with_tasks: bool| {
        let mut random = Random(11);
        let mut total = 0;
        for _ in 0..300 {
            let mut test = CanaryTest::new(&GateSettings {
                max_canary: 400,
                ..settings(0.0)
            });
            for n in 0u64.. {
                let teacher = random.hit(0.5);
                let student = teacher || random.hit(0.3);
                let task = if with_tasks {
                    n.to_string()
                } else {
                    String::new()
                };
                // The student plays a task long after the teacher did.
                test.push(&outcome(Arm::Teacher, &task, "grid", teacher, 2 * n));
                let (task, student) = if with_tasks {
                    (task, student)
                } else {
                    (String::new(), random.hit(0.65))
                };
                test.push(&outcome(Arm::Student, &task, "grid", student, 2 * n + 1));
                if test.ruling().decision != GateDecision::Wait {
                    total += n;
                    break;
                }
            }
        }
        total
    };
    let (paired, unpaired) = (episodes_needed(true), episodes_needed(false));
    println!(
        "mean pairs until decided: {} by task, {} by arrival",
        paired / 300,
        unpaired / 300
    );
    assert!(2 * paired < unpaired, "{paired} {unpaired}");
}

#[test]
fn an_unwatched_fall_is_noticed_and_a_steady_student_is_left_alone() {
    let mut random = Random(3);
    // The worst steady case: exactly as much as is asked for, for 200 episodes.
    let alarms = (0..RUNS)
        .filter(|_| {
            let mut test = RollbackTest::new(0.6, 0.1, 0.05);
            (0..200).any(|_| test.push(random.hit(0.5)))
        })
        .count();
    println!(
        "steady at the floor: {:.4} false alarms",
        alarms as f64 / RUNS as f64
    );
    assert!(alarms as f64 <= 0.05 * RUNS as f64);
    for (good_for, bad) in [(0, 0.0), (0, 0.2), (200, 0.0), (200, 0.2)] {
        let mut delays = Vec::new();
        for _ in 0..300 {
            let mut test = RollbackTest::new(0.6, 0.1, 0.05);
            (0..good_for).for_each(|_| {
                test.push(random.hit(0.7));
            });
            if !test.alarmed() {
                delays.push(
                    (1..2000)
                        .find(|_| test.push(random.hit(bad)))
                        .unwrap_or(2000),
                );
            }
        }
        delays.sort_unstable();
        let median = delays[delays.len() / 2];
        println!("0.7 for {good_for} episodes, then {bad}: alarm after {median} (median)");
        assert!(median <= if bad == 0.0 { 30 } else { 80 }, "{median}");
    }
}

#[test]
fn wilson_gives_the_intervals_of_its_formula_worked_out_elsewhere() {
    // As the formula gives them with the quantile of Python's `statistics.NormalDist().inv_cdf(0.975)`.
    for (k, n, low, high) in [
        (13, 60, 0.1312, 0.3362),
        (79, 100, 0.7002, 0.8583),
        (43, 100, 0.3373, 0.5278),
        (0, 10, 0.0, 0.2775),
    ] {
        let (l, h) = wilson(k, n, 0.05);
        assert!(
            (l - low).abs() < 2e-4 && (h - high).abs() < 2e-4,
            "{k}/{n}: {l} {h}"
        );
    }
    assert_eq!(wilson(0, 0, 0.05), (0.0, 1.0));
    assert_eq!(wilson(7, 7, 0.05).1, 1.0);
}

#[test]
fn an_anytime_interval_holds_at_all_times_at_once() {
    let mut random = Random(5);
    let runs = 1000;
    let missed = (0..runs)
        .filter(|_| {
            let mut successes = 0;
            (1..=200u64).any(|n| {
                successes += u64::from(random.hit(0.4));
                // Looked at after every tenth episode.
                let (low, high) = if n % 10 == 0 {
                    anytime_interval(successes, n, 0.05)
                } else {
                    (0.0, 1.0)
                };
                !(low..=high).contains(&0.4)
            })
        })
        .count();
    println!("anytime interval missed in {missed} of {runs} runs");
    assert!(missed as f64 <= 0.05 * runs as f64);
    for (k, n) in [(0, 5), (5, 5), (30, 100), (700, 1000)] {
        let ((low, high), (l, h)) = (anytime_interval(k, n, 0.05), wilson(k, n, 0.05));
        let mean = k as f64 / n as f64;
        assert!(
            low <= mean && mean <= high && high - low >= h - l,
            "{k}/{n}: {low} {high}"
        );
    }
    let (low, high) = anytime_interval(3_000, 10_000, 0.05);
    assert!(high - low < 0.05, "{low} {high}");
    let (low, high) = anytime_difference(&[0.0; 400], 0.05);
    assert!(low > -0.1 && high < 0.1, "{low} {high}");
}

#[test]
fn a_canary_survives_being_written_down_and_is_rebuilt_from_its_outcomes() {
    let mut random = Random(9);
    let outcomes: Vec<LiveOutcome> = (0..120)
        .map(|at| {
            let arm = if random.hit(0.5) {
                Arm::Student
            } else {
                Arm::Teacher
            };
            let (task, domain) = (format!("t{}", at / 4), ["a", "b"][at as usize % 2]);
            outcome(arm, &task, domain, random.hit(0.5), at)
        })
        .collect();
    let mut straight = CanaryTest::new(&settings(0.05));
    for outcome in &outcomes {
        straight.push(outcome);
    }
    let mut shuffled = outcomes.clone();
    shuffled.reverse();
    let rebuilt = CanaryTest::rebuild(&settings(0.05), &shuffled);
    assert_eq!(rebuilt, straight);
    let json = serde_json::to_string(&straight).unwrap();
    let read: CanaryTest = serde_json::from_str(&json).unwrap();
    assert_eq!(read.verdict(), straight.verdict());
}

fn good_student(n: u64) -> CanaryTest {
    let mut test = CanaryTest::new(&settings(0.05));
    for at in 0..n {
        test.push(&outcome(Arm::Teacher, "", "grid", at % 4 == 0, 2 * at));
        test.push(&outcome(Arm::Student, "", "grid", at % 4 != 0, 2 * at + 1));
    }
    test
}

#[test]
fn no_vote_lifts_a_refusal_and_any_vote_may_hold() {
    let good = good_student(60);
    assert_eq!(good.verdict().decision, GateDecision::Pass);
    assert!(
        good.verdict()
            .with_vote(&GateVote::Promote("fine".into()))
            .pass
    );
    assert_eq!(
        good.verdict()
            .with_vote(&GateVote::Hold("friday".into()))
            .decision,
        GateDecision::Hold
    );
    assert_eq!(
        good.verdict()
            .with_vote(&GateVote::Reject("no".into()))
            .decision,
        GateDecision::Reject
    );

    let mut invalid = good_student(60);
    let mut bad = outcome(Arm::Student, "", "grid", true, 1_000);
    bad.invalid_calls = 1;
    invalid.push(&bad);
    assert_eq!(invalid.verdict().decision, GateDecision::Reject);
    assert!(
        !invalid
            .verdict()
            .with_vote(&GateVote::Promote("I insist".into()))
            .pass
    );

    let mut dishonest = good_student(60);
    bad.invalid_calls = 0;
    bad.integrity_ok = false;
    dishonest.push(&bad);
    assert!(
        !dishonest
            .verdict()
            .with_vote(&GateVote::Promote("I insist".into()))
            .pass
    );

    let few = good_student(8).verdict();
    assert_eq!(few.decision, GateDecision::Wait);
    assert_eq!(few.needs, ["2 more live episodes played by the student"]);
    assert!(!few.with_vote(&GateVote::Promote("early".into())).pass);
}

#[test]
fn a_domain_in_which_the_student_fails_refuses_it_though_the_whole_is_better() {
    let mut test = good_student(70);
    for at in 0..30 {
        test.push(&outcome(
            Arm::Teacher,
            "",
            "maze",
            at % 3 != 0,
            1_000 + 2 * at,
        ));
        test.push(&outcome(Arm::Student, "", "maze", false, 1_001 + 2 * at));
    }
    let verdict = test.verdict();
    assert!(!verdict.pass);
    assert!(
        verdict.sentence().contains("maze"),
        "{}",
        verdict.sentence()
    );
}

#[test]
fn an_undecided_student_is_put_aside_in_the_end() {
    let mut test = CanaryTest::new(&GateSettings {
        max_canary: 40,
        ..settings(0.0)
    });
    for at in 0..40 {
        test.push(&outcome(Arm::Teacher, "", "grid", at % 2 == 0, 2 * at));
        test.push(&outcome(Arm::Student, "", "grid", at % 2 == 1, 2 * at + 1));
    }
    assert_eq!(test.verdict().decision, GateDecision::Hold);
    assert!(test
        .verdict()
        .sentence()
        .contains("undecided after 40 episodes"));
}

fn report(steps: u64, exact: u64, loss: f64) -> OfflineReport {
    OfflineReport {
        steps,
        exact,
        loss,
        episodes: steps.div_ceil(5),
        held_out_share: 0.1,
        ..OfflineReport::default()
    }
}

#[test]
fn the_offline_stage_says_what_it_refuses_and_what_it_lacks() {
    let settings = GateSettings::default();
    let base = report(100, 10, 2.0);
    let check = |candidate: &OfflineReport, incumbent: Option<&OfflineReport>| {
        offline(candidate, Some(&base), incumbent, &settings)
    };
    assert!(check(&report(100, 80, 0.3), None).pass);
    assert!(check(&report(100, 80, 0.3), Some(&report(100, 82, 0.298))).pass);
    for (candidate, says) in [
        (report(100, 30, 0.3), "below the 40 %"),
        (report(100, 80, 2.5), "untrained"),
        (report(100, 80, f64::NAN), "not a number"),
        (
            OfflineReport {
                invalid: 1,
                ..report(100, 80, 0.3)
            },
            "no valid calls",
        ),
    ] {
        let verdict = check(&candidate, None);
        assert_eq!(verdict.decision, GateDecision::Reject);
        assert!(verdict.sentence().contains(says), "{}", verdict.sentence());
    }
    assert!(!check(&report(100, 80, 0.3), Some(&report(100, 80, 0.2))).pass);
    let mut few = report(10, 9, 0.3);
    few.domains = BTreeMap::from([(
        "GoToLocal".into(),
        SliceCount {
            steps: 10,
            exact: 9,
        },
    )]);
    let verdict = check(&few, None);
    assert_eq!(verdict.decision, GateDecision::Hold);
    assert!(
        verdict.needs[0].starts_with("about 20 more passing episodes of GoToLocal"),
        "{:?}",
        verdict.needs
    );
}

#[test]
fn the_shadow_stage_counts_failures_and_only_reports_agreement() {
    let settings = GateSettings {
        shadow_steps: 20,
        max_shadow_failures: 0.05,
        ..GateSettings::default()
    };
    let check = |steps, failures, invalid, agree| {
        shadow(
            &ShadowReport {
                steps,
                failures,
                invalid,
                agree,
            },
            &settings,
        )
        .decision
    };
    assert_eq!(check(20, 0, 0, 0), GateDecision::Pass);
    assert_eq!(check(5, 1, 0, 4), GateDecision::Wait);
    assert_eq!(check(20, 1, 0, 15), GateDecision::Wait);
    assert_eq!(check(21, 1, 0, 15), GateDecision::Pass);
    assert_eq!(check(40, 5, 0, 35), GateDecision::Reject);
    assert_eq!(check(19, 0, 1, 18), GateDecision::Reject);
}
