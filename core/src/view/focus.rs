//! Focus: the clauses of an observation that speak of what the goal speaks of. String overlap only, no knowledge of any environment.

/// Most bytes of an observation that are searched for clauses; the end is what counts.
const MAX_SEARCHED_BYTES: usize = 64 << 10;
/// Longest text that still counts as a clause, in bytes. Without an upper limit one line without punctuation would be shown twice.
const MAX_CLAUSE_BYTES: usize = 300;

/// Words that carry no content of their own in a goal: function words, and verbs that name what to do rather than to what.
const STOP_WORDS: &[&str] = &[
    "a", "an", "the", "this", "that", "these", "those", "it", "its", "i", "me", "my", "we", "our",
    "you", "your", "he", "she", "they", "them", "their", "his", "her", "and", "or", "but", "if",
    "then", "than", "so", "as", "of", "to", "in", "on", "at", "by", "for", "from", "with", "into",
    "onto", "out", "up", "down", "off", "over", "under", "about", "after", "before", "until",
    "while", "is", "are", "was", "were", "be", "been", "am", "do", "does", "did", "has", "have",
    "had", "can", "could", "will", "would", "shall", "should", "may", "might", "must", "not", "no",
    "yes", "there", "here", "what", "which", "who", "where", "when", "how", "why", "all", "any",
    "each", "some", "other", "one", "please", "hi", "hello", "also", "just", "first", "next",
    "last", "task", "goal", "see", "look", "go", "get", "find", "pick", "put", "take", "place",
    "move", "bring", "fetch", "reach", "open", "close", "click", "press", "push", "select",
    "choose", "enter", "type", "fill", "use", "make", "let", "like", "want", "need", "help", "try",
    "set", "add", "give", "show", "tell", "know", "d", "ll", "m", "re", "s", "t", "ve",
];

/// At most `max` clauses of `observation` (cut at `;`, newlines, and at `.` and `,` that end a word) that share at least
/// `overlap` different content words with `goal`; the best overlap first, ties in the order of the observation, none twice.
/// A goal with fewer content words than `overlap` asks for all of its words; one without any has no focus.
pub fn focus(goal: &str, observation: &str, max: usize, overlap: usize) -> Vec<String> {
    let mut wanted: Vec<String> = words(goal)
        .filter(|w| !STOP_WORDS.contains(&w.as_str()))
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    if max == 0 || wanted.is_empty() {
        return Vec::new();
    }
    let needed = overlap.clamp(1, wanted.len());
    let mut found: Vec<(usize, &str)> = Vec::new();
    for clause in clauses(tail(observation, MAX_SEARCHED_BYTES)) {
        let mut shared: Vec<String> = words(clause)
            .filter(|w| wanted.binary_search(w).is_ok())
            .collect();
        shared.sort_unstable();
        shared.dedup();
        if shared.len() >= needed && !found.iter().any(|(_, c)| *c == clause) {
            found.push((shared.len(), clause));
        }
    }
    // A stable sort: ties stay in the order of the observation.
    found.sort_by_key(|(shared, _)| std::cmp::Reverse(*shared));
    found
        .into_iter()
        .take(max)
        .map(|(_, clause)| clause.to_string())
        .collect()
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
}

/// The last `max` bytes of `text`, from a character's beginning.
fn tail(text: &str, max: usize) -> &str {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

fn clauses(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let cut = text.char_indices().find(|(at, c)| match c {
            ';' | '\n' => true,
            // 3.5, file.txt and 1,000 are one word.
            '.' | ',' => !text[at + 1..].starts_with(char::is_alphanumeric),
            _ => false,
        });
        let clause = match cut {
            Some((at, _)) => {
                rest = Some(&text[at + 1..]);
                &text[..at]
            }
            None => {
                rest = None;
                text
            }
        };
        Some(clause.trim())
    })
    .filter(|clause| !clause.is_empty() && clause.len() <= MAX_CLAUSE_BYTES)
}
