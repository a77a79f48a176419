//! Several processes on one store: all record, one learns, another takes over from it when it is killed, and all see a swap.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use super::life::{copy, grounds, verify, Birth, Kind, Said};

const MEMBERS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of all members as they come.
struct Heard {
    lines: Receiver<(usize, String)>,
    all: BTreeMap<usize, String>,
    /// Lines that nobody has waited for yet: processes do not agree on whose comes first.
    early: Vec<(usize, String)>,
}

impl Heard {
    /// Waits for a line of any of these members that begins with this word, and gives the member and the rest; it may have come already.
    #[track_caller]
    fn wait(&mut self, members: &[usize], word: &str) -> (usize, String) {
        let begun = Instant::now();
        let wanted = |member: usize, line: &str| {
            members.contains(&member) && line.split(' ').next() == Some(word)
        };
        let rest = |line: String| line[word.len()..].trim().to_string();
        if let Some(at) = self.early.iter().position(|(m, line)| wanted(*m, line)) {
            let (member, line) = self.early.remove(at);
            return (member, rest(line));
        }
        while begun.elapsed() < PATIENCE {
            let Ok((member, line)) = self.lines.recv_timeout(Duration::from_secs(1)) else {
                continue;
            };
            let all = self.all.entry(member).or_default();
            all.push_str(&line);
            all.push('\n');
            assert!(!line.starts_with("error"), "member {member}: {line}");
            if wanted(member, &line) {
                return (member, rest(line));
            }
            if !line.starts_with("durable") {
                self.early.push((member, line));
            }
        }
        panic!("no {word:?} of {members:?}: {:#?}", self.all);
    }
}

#[test]
fn one_of_several_processes_learns_another_takes_over_and_all_see_the_swap_within_a_second() {
    let grounds = grounds();
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    copy(&grounds.store, &store);
    let (send, lines) = channel();
    let mut processes = Vec::new();
    for member in 0..MEMBERS {
        let birth = Birth {
            store: &store,
            life: 1 + member as u64,
            kind: Kind::Member,
            fault: None,
            env: Vec::new(),
        };
        let mut process = birth.spawn();
        let out = BufReader::new(process.stdout.take().unwrap());
        let send = send.clone();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = send.send((member, line));
            }
        });
        processes.push(process);
    }
    let mut heard = Heard {
        lines,
        all: BTreeMap::new(),
        early: Vec::new(),
    };
    let everybody: Vec<usize> = (0..MEMBERS).collect();
    let (first, _) = heard.wait(&everybody, "learning");
    processes[first].kill().unwrap();
    processes[first].wait().unwrap();
    let killed = Instant::now();
    let left: Vec<usize> = everybody.into_iter().filter(|m| *m != first).collect();
    heard.wait(&left, "learning");
    let taken_over = killed.elapsed();
    let (promoter, promoted) = heard.wait(&left, "promoted");
    let (version, at) = promoted.split_once(' ').unwrap();
    let others: Vec<usize> = left.iter().copied().filter(|m| *m != promoter).collect();
    let (_, served) = heard.wait(&others, "serves");
    let (seen, when) = served.split_once(' ').unwrap();
    assert_eq!(seen, version);
    let ms = |text: &str| text.parse::<i64>().unwrap();
    let late = ms(when) - ms(at);
    println!(
        "the role was taken over {:.1} s after the kill; the swap was seen {late} ms after it",
        taken_over.as_secs_f64()
    );
    assert!(late <= 1000, "the swap was seen after {late} ms");
    std::fs::write(folder.path().join("stop"), "").unwrap();
    let mut running = left;
    while !running.is_empty() {
        let (member, _) = heard.wait(&running, "done");
        running.retain(|other| *other != member);
        assert!(processes[member].wait().unwrap().success());
    }
    let said: Vec<Said> = heard.all.values().map(|text| Said::read(text)).collect();
    assert!(said.iter().all(|s| !s.episodes.is_empty()), "all record");
    verify(
        &store,
        &said.iter().collect::<Vec<_>>(),
        "several processes",
    );
}
