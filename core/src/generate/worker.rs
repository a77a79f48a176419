//! The engine's thread: takes jobs in, has the model make a step for some of them, chooses tokens, hands out what ended.

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Instant;

use super::fast::{self, FastOp, FastOrder, FastReport, Snapshots};
use super::prefix::Prefixes;
use super::sampler;
use super::scheduler::{self, Slot, MAX_CARD_ROWS, MAX_PREFILL_ROWS};
use super::seat::{self, Cards, Seat, Unread};
use super::{
    locked, EngineCounters, EngineOptions, FastError, Finish, GenerateError, Generated, Job,
    Shared, Ticket,
};
use crate::chat::Grammar;
use crate::device::DeviceError;
use crate::kernels::{log_sum_exp, Hold, Pool, Random};
use crate::limits::{MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS};

/// Room for a reply in a new sequence; it grows if that is not enough.
const REPLY_ROOM: usize = 64;
/// Tokens of each chunk whose loss is looked at where a rule wants to know: their logits cost little beside the chunk's.
const LOSS_TOKENS: usize = 16;

/// Serves until the engine is dropped.
pub(super) fn run(
    shared: Arc<Shared>,
    options: EngineOptions,
    on_done: Box<dyn Fn(u64) + Send + Sync>,
) {
    let _end = End(&shared);
    let pool = Pool::new(options.threads, 0);
    let mut worker = Worker {
        pool,
        max_batch: options.max_batch.max(1),
        on_done,
        active: Vec::new(),
        prefixes: Prefixes::new(options.cache_bytes),
        snapshots: Snapshots::new(options.cache_bytes),
        cards: Cards::new(options.device),
        last_student: 0,
        counters: EngineCounters::default(),
        prefill: Speed::default(),
        decode: Speed::default(),
        fault: None,
    };
    loop {
        let (jobs, fast, keep_only, forget, stop) = {
            let mut inbox = locked(&shared.inbox);
            while inbox.jobs.is_empty()
                && inbox.fast.is_empty()
                && inbox.keep_only.is_none()
                && inbox.forget.is_empty()
                && !inbox.stop
                && worker.active.is_empty()
            {
                inbox = shared
                    .wake
                    .wait(inbox)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            (
                std::mem::take(&mut inbox.jobs),
                std::mem::take(&mut inbox.fast),
                inbox.keep_only.take(),
                std::mem::take(&mut inbox.forget),
                inbox.stop,
            )
        };
        worker.active.extend(
            jobs.into_iter()
                .map(|(job, ticket, hold)| Active::new(job, ticket, hold)),
        );
        if stop {
            worker.end_all(&GenerateError::Closed);
            return;
        }
        for request in fast {
            let done = worker.fast(request.key, request.op);
            // Whoever asked may have stopped waiting.
            request.answer.map(|answer| answer.send(done));
        }
        if !forget.is_empty() {
            worker.prefixes.forget(&forget);
            for active in &mut worker.active {
                active.keep &= !forget.contains(&active.job.key);
            }
        }
        if worker.fault.is_none() {
            let turn = catch_unwind(AssertUnwindSafe(|| worker.turn(keep_only)));
            if let Err(panic) = turn {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
                worker.fault = Some(text.unwrap_or_else(|| "a panic without a message".into()));
            }
        }
        if let Some(why) = worker.fault.clone() {
            worker.end_all(&GenerateError::Fault(why));
            worker.prefixes.keep_only(&[]);
            worker.snapshots.clear();
        }
        worker.publish(&shared);
    }
}

/// However the thread ends, nobody waits for it any more: neither for a reply nor before the gate.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut inbox = locked(&self.0.inbox);
        inbox.stop = true;
        inbox.fast.clear();
        for (_, ticket, _) in inbox.jobs.drain(..) {
            ticket.end(Err(GenerateError::Closed));
        }
    }
}

/// A job in the engine.
struct Active {
    /// Keeps background work away while the job is here, unless it is in the background itself.
    hold: Option<Hold>,
    job: Job,
    ticket: Ticket,
    /// Absent until the model has something to read.
    sequence: Option<Seat>,
    /// The prompt and, behind it, the reply so far. Those beyond the sequence's length have not been read yet.
    tokens: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    random: Random,
    /// Bytes of the reply's last character, where more of it is to come.
    held: Vec<u8>,
    keep: bool,
    began: Option<Instant>,
    first_token: Option<Instant>,
    cached_tokens: usize,
    free_tokens: usize,
    logprob: f64,
    min_logprob: f64,
}

/// Where a reply stood before a choice that may have to be taken back.
struct Kept {
    tokens: usize,
    held: usize,
    free_tokens: usize,
    logprob: f64,
    min_logprob: f64,
    grammar: Option<Grammar>,
}

type Ended = Result<Finish, GenerateError>;

impl Active {
    fn new(mut job: Job, ticket: Ticket, hold: Option<Hold>) -> Self {
        let tokens = std::mem::take(&mut job.prompt_ids);
        let random = Random::new(job.seed);
        Active {
            hold,
            prompt_len: tokens.len(),
            tokens,
            max_tokens: 0,
            random,
            job,
            ticket,
            sequence: None,
            held: Vec::new(),
            keep: true,
            began: None,
            first_token: None,
            cached_tokens: 0,
            free_tokens: 0,
            logprob: 0.0,
            min_logprob: 0.0,
        }
    }

    fn read(&self) -> usize {
        self.sequence
            .as_ref()
            .map_or(0, |sequence| sequence.ids().len())
    }

    fn student(&self) -> usize {
        Arc::as_ptr(&self.job.student.model) as usize
    }

    /// Checks the prompt, adds what the grammar forces and finds a sequence that begins like it.
    fn begin(&mut self, prefixes: &mut Prefixes, cards: &mut Cards) -> Option<Ended> {
        self.began = Some(Instant::now());
        let model = &self.job.student.model;
        let (tokens, limit) = (
            self.prompt_len,
            MAX_PROMPT_TOKENS.min(model.max_positions().saturating_sub(1)),
        );
        if tokens > limit {
            return Some(Err(GenerateError::PromptTooLong { tokens, limit }));
        }
        if tokens == 0 {
            return Some(Err(GenerateError::Model("the prompt has no tokens".into())));
        }
        let room = model.max_positions() - tokens;
        self.max_tokens = self.job.max_tokens.min(MAX_REPLY_TOKENS).min(room);
        if let Some(ended) = self.add_forced() {
            return Some(ended);
        }
        let (capacity, learning) = self.room();
        let student = &self.job.student;
        let found = prefixes.take(student, self.job.key, &self.tokens, capacity, learning);
        let sequence = found.unwrap_or_else(|| cards.sequence(&student.model, capacity, learning));
        self.cached_tokens = sequence.ids().len().min(self.prompt_len);
        self.sequence = Some(sequence);
        self.ask_rule(false);
        None
    }

    /// Tokens that a new sequence should have room for, and whether it learns.
    fn room(&self) -> (usize, bool) {
        let learns = self.job.student.model.config.ttt.is_some();
        let capacity = self.tokens.len() + self.max_tokens.min(REPLY_ROOM);
        (capacity, self.job.fast_weights && learns)
    }

    /// Begins to read again on the processor, after a card failed.
    fn leave_card(&mut self) {
        let (capacity, learning) = self.room();
        let sequence = self.job.student.model.sequence(capacity, learning);
        self.sequence = Some(Seat::Host(sequence));
        self.ask_rule(false);
    }

    /// Has the job's rule say how the sequence goes on learning; without one it goes on as it was trained to, whatever a rule of an
    /// earlier step has said.
    fn ask_rule(&mut self, behind_chunk: bool) {
        let Some(sequence) = &mut self.sequence else {
            return;
        };
        let trained = self.job.student.model.config.ttt.as_ref();
        let Some(trained) = trained.filter(|_| sequence.is_learning()) else {
            return;
        };
        let order = match &self.job.fast_rule {
            Some(rule) => rule(&fast::seen(sequence, behind_chunk)),
            None => FastOrder::default(),
        };
        sequence.obey(order, self.job.fast_rule.is_some(), trained);
    }

    /// Tokens up to the next edge, where a rule wants to be asked there.
    fn to_edge(&self) -> usize {
        let chunk = |s: &Seat| Some(s.chunk_len()? - s.ids().len() % s.chunk_len()?);
        let ruled = self
            .sequence
            .as_ref()
            .filter(|_| self.job.fast_rule.is_some());
        ruled.and_then(chunk).unwrap_or(usize::MAX)
    }

    /// Takes the tokens that the grammar leaves no choice about, and says whether that was the end.
    fn add_forced(&mut self) -> Option<Ended> {
        let room = self.max_tokens - (self.tokens.len() - self.prompt_len);
        if let Some(grammar) = &mut self.job.grammar {
            let forced = grammar.forced();
            let done = grammar.is_done();
            let fits = forced.len() <= room;
            for token in forced.into_iter().take(room) {
                self.add(token);
            }
            if done && fits {
                return Some(Ok(Finish::Stop));
            }
        }
        let full = self.tokens.len() - self.prompt_len >= self.max_tokens;
        full.then_some(Ok(Finish::Length))
    }

    /// Adds a token to the reply and says the characters that it completes.
    fn add(&mut self, token: u32) {
        self.tokens.push(token);
        self.held
            .extend(self.job.student.chat.tokenizer.token_bytes(token));
        if self.job.avoid.is_some() {
            // It may have to be taken back.
            return;
        }
        let said = complete(&mut self.held);
        if !said.is_empty() {
            self.ticket.say(&said);
        }
    }

    /// Chooses the next token from a row of logits (v), and another one where the first leads to the reply to avoid.
    fn choose(&mut self, logits: &[f32]) -> Option<Ended> {
        let Some(avoid) = self.job.avoid.clone() else {
            return self.choose_among(logits, None);
        };
        let before = Kept {
            tokens: self.tokens.len(),
            held: self.held.len(),
            free_tokens: self.free_tokens,
            logprob: self.logprob,
            min_logprob: self.min_logprob,
            grammar: self.job.grammar.as_ref().map(Grammar::fork),
        };
        let end = self.choose_among(logits, None);
        if self.held != avoid.as_bytes() {
            return end;
        }
        let grammar = before.grammar.as_ref().map(Grammar::fork);
        let left = avoid.as_bytes()[before.held..].to_vec();
        let first = self.come_back(before, grammar);
        let other = self.choose_among(logits, Some(&left));
        if !matches!(other, Some(Err(_))) {
            return other;
        }
        // There is no other reply: the first one after all.
        let grammar = first.grammar.as_ref().map(Grammar::fork);
        self.come_back(first, grammar);
        self.choose_among(logits, None)
    }

    /// Takes back what was chosen since `kept`, which is handed out again.
    fn come_back(&mut self, kept: Kept, grammar: Option<Grammar>) -> Kept {
        self.tokens.truncate(kept.tokens);
        self.held.truncate(kept.held);
        self.free_tokens = kept.free_tokens;
        self.logprob = kept.logprob;
        self.min_logprob = kept.min_logprob;
        self.job.grammar = grammar;
        kept
    }

    /// Chooses the next token from a row of logits (v); none that begins like `not`, or that begins it.
    fn choose_among(&mut self, logits: &[f32], not: Option<&[u8]>) -> Option<Ended> {
        self.first_token.get_or_insert_with(Instant::now);
        let draw = self.random.unit();
        let chat = &self.job.student.chat;
        let allowed = match &mut self.job.grammar {
            Some(grammar) => match grammar.allowed() {
                Ok(words) => Some((words, chat.tokenizer.vocab_size())),
                Err(error) => return Some(Err(GenerateError::Grammar(error.to_string()))),
            },
            None => None,
        };
        let mut others = Vec::new();
        let allowed = match (allowed, not) {
            (Some((words, vocab)), Some(not)) => {
                others.extend_from_slice(words);
                for token in 0..vocab.min(32 * words.len()) as u32 {
                    let bytes = chat.tokenizer.token_bytes(token);
                    if !bytes.is_empty() && (not.starts_with(&bytes) || bytes.starts_with(not)) {
                        others[token as usize / 32] &= !(1 << (token % 32));
                    }
                }
                Some((&others[..], vocab))
            }
            (allowed, _) => allowed,
        };
        let Some(choice) = sampler::choose(logits, allowed, self.job.temperature, draw) else {
            let why = "no token that may be chosen has a finite logit";
            return Some(Err(GenerateError::Model(why.into())));
        };
        if choice.free {
            self.free_tokens += 1;
            self.logprob += choice.logprob;
            self.min_logprob = self.min_logprob.min(choice.logprob);
        }
        if let Some(grammar) = &mut self.job.grammar {
            if let Err(error) = grammar.accept(choice.token) {
                return Some(Err(GenerateError::Grammar(error.to_string())));
            }
        }
        if chat.eos_ids.contains(&choice.token) {
            return Some(Ok(Finish::Stop));
        }
        self.add(choice.token);
        self.add_forced()
    }

    fn generated(&mut self, finish: Finish) -> Generated {
        let now = Instant::now();
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() {
            self.ticket.say(&String::from_utf8_lossy(&held));
        }
        let began = self.began.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        let ms =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f32() * 1e3;
        let reply_ids = self.tokens[self.prompt_len..].to_vec();
        Generated {
            text: self.job.student.chat.tokenizer.decode(&reply_ids),
            reply_ids,
            finish,
            confidence: self.logprob.exp() as f32,
            mean_logprob: (self.logprob / self.free_tokens.max(1) as f64) as f32,
            min_prob: self.min_logprob.exp() as f32,
            free_tokens: self.free_tokens,
            cached_tokens: self.cached_tokens,
            queue_ms: ms(self.ticket.0.submitted, began),
            prefill_ms: ms(began, first),
            decode_ms: ms(first, now),
        }
    }
}

/// Positions among `range`, which is about to be read, whose next token is known and whose loss is looked at for a rule.
fn looked_at(seat: &Seat, tokens: &[u32], range: Range<usize>) -> Vec<usize> {
    let Some(chunk) = seat.chunk_len() else {
        return Vec::new();
    };
    let stride = chunk.div_ceil(LOSS_TOKENS);
    let known = range.start..range.end.min(tokens.len() - 1);
    known
        .filter(|position| position % stride == stride / 2)
        .collect()
}

/// Notes the losses of `positions` by their logits (n, v), and ends the chunk's mean at its edge.
fn note_losses(seat: &mut Seat, tokens: &[u32], positions: &[usize], logits: &[f32], vocab: usize) {
    for (position, logits) in positions.iter().zip(logits.chunks_exact(vocab)) {
        let target = logits[tokens[position + 1] as usize];
        let loss = log_sum_exp(logits) - f64::from(target);
        seat.losses_mut().add(loss);
    }
    let end = seat.ids().len();
    if seat
        .chunk_len()
        .is_some_and(|chunk| end.is_multiple_of(chunk))
    {
        seat.losses_mut().close();
    }
}

/// Takes the whole characters out of `bytes`; what can never become one turns into U+FFFD. An unfinished one stays.
fn complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < bytes.len() {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = bytes.len();
            }
            Err(error) => {
                let valid = at + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[at..valid]));
                at = valid;
                let Some(bad) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                at += bad;
            }
        }
    }
    bytes.drain(..at);
    text
}

/// Tokens and the time they took.
#[derive(Default)]
struct Speed {
    tokens: f64,
    seconds: f64,
}

impl Speed {
    fn add(&mut self, tokens: usize, seconds: f64) {
        self.tokens += tokens as f64;
        self.seconds += seconds;
    }

    fn rate(&self) -> f64 {
        if self.seconds > 0.0 {
            self.tokens / self.seconds
        } else {
            0.0
        }
    }
}

struct Worker {
    pool: Pool,
    max_batch: usize,
    on_done: Box<dyn Fn(u64) + Send + Sync>,
    /// Oldest first.
    active: Vec<Active>,
    prefixes: Prefixes,
    snapshots: Snapshots,
    cards: Cards,
    /// The student of the last step, as [`Slot::student`].
    last_student: usize,
    counters: EngineCounters,
    prefill: Speed,
    decode: Speed,
    fault: Option<String>,
}

impl Worker {
    /// Looks at every job, then makes one step of the model.
    fn turn(&mut self, keep_only: Option<Vec<u64>>) {
        if let Some(versions) = keep_only {
            self.prefixes.keep_only(&versions);
            self.snapshots.clear();
            for active in &mut self.active {
                active.keep &= versions.contains(&active.job.student.version);
            }
        }
        let now = Instant::now();
        self.end_where(|active| {
            if active.ticket.is_cancelled() {
                return Some(Err(GenerateError::Cancelled));
            }
            let waited = now.saturating_duration_since(active.ticket.0.submitted);
            let late = GenerateError::Late {
                waited_ms: waited.as_millis() as u64,
            };
            (now >= active.job.deadline).then_some(Err(late))
        });
        let slots: Vec<Slot> = self
            .active
            .iter()
            .map(|active| Slot {
                student: active.student(),
                background: active.job.background,
                left: (active.tokens.len() - active.read()).max(1),
                decoding: active.first_token.is_some(),
            })
            .collect();
        let elsewhere = |active: &Active| active.sequence.as_ref().is_none_or(Seat::is_on_card);
        let most_rows = match self.cards.serve() && self.active.iter().all(elsewhere) {
            true => MAX_CARD_ROWS,
            false => MAX_PREFILL_ROWS,
        };
        let batch = scheduler::next(&slots, self.last_student, self.max_batch, most_rows);
        if let Some((at, _)) = batch.first() {
            self.last_student = slots[*at].student;
            self.step(&batch);
        }
    }

    /// One step for jobs of one student: places in `active` and tokens to read of each.
    fn step(&mut self, batch: &[(usize, usize)]) {
        let mut ended: Vec<(usize, Ended)> = Vec::new();
        let mut parts: Vec<(usize, Seat, usize)> = Vec::new();
        for &(at, planned) in batch {
            let active = &mut self.active[at];
            let mut planned = planned;
            if active.began.is_none() {
                if let Some(end) = active.begin(&mut self.prefixes, &mut self.cards) {
                    ended.push((at, end));
                    continue;
                }
                self.counters.prompt_tokens += active.prompt_len as u64;
                self.counters.cached_tokens += active.cached_tokens as u64;
                // The plan was made before the grammar's first tokens were known: they go along with a prompt that fits.
                if planned == active.prompt_len {
                    planned = MAX_PREFILL_ROWS;
                }
            }
            let planned = planned.min(active.to_edge());
            if let Some(sequence) = active.sequence.take() {
                // What was found in the cache makes it less than was planned.
                let left = active.tokens.len() - sequence.ids().len();
                parts.push((at, sequence, left.min(planned)));
            }
        }
        if !parts.is_empty() {
            self.compute(parts, &mut ended);
        }
        // From the back, so that earlier places stay what they are; outcomes are then handed out oldest first.
        ended.sort_by_key(|(at, _)| *at);
        let mut out: Vec<(Active, Ended)> = ended
            .into_iter()
            .rev()
            .map(|(at, end)| (self.active.remove(at), end))
            .collect();
        while let Some((active, end)) = out.pop() {
            self.finish(active, end);
        }
    }

    /// One step, or two where some sequences are on a card and others are not.
    fn compute(&mut self, parts: Vec<(usize, Seat, usize)>, ended: &mut Vec<(usize, Ended)>) {
        let (card, host): (Vec<_>, Vec<_>) = parts
            .into_iter()
            .partition(|(_, seat, _)| seat.is_on_card());
        for parts in [card, host].into_iter().filter(|parts| !parts.is_empty()) {
            self.compute_there(parts, ended);
        }
    }

    fn compute_there(
        &mut self,
        mut parts: Vec<(usize, Seat, usize)>,
        ended: &mut Vec<(usize, Ended)>,
    ) {
        let started = Instant::now();
        let model = self.active[parts[0].0].job.student.model.clone();
        // Of each sequence the rows whose losses are looked at, and the last one where the next token is to be chosen.
        let (mut rows, mut looked, mut row) = (Vec::new(), Vec::new(), 0);
        for (at, seat, tokens) in &parts {
            let active = &self.active[*at];
            let range = seat.ids().len()..seat.ids().len() + tokens;
            let positions = match active.job.fast_rule {
                Some(_) => looked_at(seat, &active.tokens, range.clone()),
                None => Vec::new(),
            };
            rows.extend(
                positions
                    .iter()
                    .map(|position| row + position - range.start),
            );
            let asks = range.end == active.tokens.len();
            rows.extend(asks.then_some(row + tokens - 1));
            looked.push((positions, asks));
            row += tokens;
        }
        let mut reading: Vec<(&mut Seat, &[u32])> = parts
            .iter_mut()
            .map(|(at, seat, tokens)| {
                let from = seat.ids().len();
                (seat, &self.active[*at].tokens[from..from + *tokens])
            })
            .collect();
        let logits = match seat::read(&self.pool, &model, &mut reading, &rows) {
            Ok(logits) => logits,
            Err(Unread::Model(error)) => {
                let why = GenerateError::Model(error.to_string());
                ended.extend(parts.into_iter().map(|(at, ..)| (at, Err(why.clone()))));
                return;
            }
            Err(Unread::Card(why)) => return self.leave_card(parts, &why),
        };
        let mut asking = Vec::new();
        let (mut prefill, mut decode, mut seen) = (0, 0, 0);
        let vocab = model.config.vocab_size;
        for ((at, mut sequence, tokens), (positions, asks)) in parts.into_iter().zip(looked) {
            let own = &logits[seen * vocab..(seen + positions.len() + usize::from(asks)) * vocab];
            seen += own.len() / vocab;
            let active = &mut self.active[at];
            match active.first_token {
                Some(_) => decode += tokens,
                None => prefill += tokens,
            }
            let mut drifted = None;
            for (layer, update) in sequence.take_updates() {
                self.counters.fast_updates += 1;
                self.counters.fast_trips += u64::from(update.tripped);
                let drift = update.drift;
                let why = GenerateError::Drifted { layer, drift };
                drifted = drifted.or(update.tripped.then_some(why));
            }
            let drift = f64::from(sequence.drift());
            self.counters.fast_drift = self.counters.fast_drift.max(drift);
            if let Some(why) = drifted {
                // Its other layers learned from the same text, and its keys and values are of all of them.
                ended.push((at, Err(why)));
                continue;
            }
            if asks {
                asking.push((at, &own[positions.len() * vocab..]));
            }
            if active.job.fast_rule.is_some() {
                note_losses(&mut sequence, &active.tokens, &positions, own, vocab);
            }
            let at_edge = sequence
                .chunk_len()
                .is_some_and(|c| sequence.ids().len().is_multiple_of(c));
            active.sequence = Some(sequence);
            if at_edge {
                active.ask_rule(true);
            }
        }
        for (at, logits) in asking {
            if let Some(end) = self.active[at].choose(logits) {
                ended.push((at, end));
            }
        }
        // A step that does both is shared out by rows.
        let seconds = started.elapsed().as_secs_f64() / (prefill + decode).max(1) as f64;
        self.prefill.add(prefill, seconds * prefill as f64);
        self.decode.add(decode, seconds * decode as f64);
    }

    /// After a step that a card failed at: its answers go on on the processor, and if the card is lost, all others there as well.
    fn leave_card(&mut self, parts: Vec<(usize, Seat, usize)>, why: &DeviceError) {
        self.cards.failed(why);
        for (at, seat, _) in parts {
            drop(seat);
            self.active[at].leave_card();
        }
        if let DeviceError::Lost(_) = why {
            let on_card = |active: &&mut Active| {
                let seat = active.sequence.as_ref();
                seat.is_some_and(Seat::is_on_card)
            };
            self.active
                .iter_mut()
                .filter(on_card)
                .for_each(Active::leave_card);
            self.prefixes.forget_cards();
            self.snapshots.forget_cards();
        }
    }

    /// Looks at or changes the state of an episode.
    fn fast(&mut self, key: u128, op: FastOp) -> Result<FastReport, FastError> {
        if let FastOp::Forget(number) = op {
            self.snapshots.forget(key, number)?;
        }
        let running = self.active.iter_mut().find(|active| active.job.key == key);
        let running = running.and_then(|active| active.sequence.as_mut());
        if let FastOp::Restore(number) = op {
            if running.is_some() {
                return Err(FastError::Busy);
            }
            let kept = self.snapshots.get(key, number)?;
            let copy = kept.copy().ok_or_else(|| FastError::NoRoom {
                needed: kept.bytes(),
                free: 0,
                limit: kept.bytes(),
            })?;
            if !self.prefixes.replace(key, copy) {
                return Err(FastError::Nothing);
            }
        }
        let sequence = match running {
            Some(sequence) => Some(sequence),
            None => self.prefixes.own(key),
        };
        let Some(sequence) = sequence else {
            return match op {
                FastOp::Inspect | FastOp::Forget(_) => Ok(FastReport::default()),
                _ => Err(FastError::Nothing),
            };
        };
        let mut snapshot = 0;
        match op {
            FastOp::Reset => sequence.reset(),
            FastOp::Snapshot => snapshot = self.snapshots.take(key, sequence)?,
            FastOp::Inspect | FastOp::Restore(_) | FastOp::Forget(_) => {}
        }
        Ok(FastReport {
            snapshot,
            snapshots: self.snapshots.of(key),
            ..sequence.report()
        })
    }

    fn end_where(&mut self, ends: impl Fn(&Active) -> Option<Ended>) {
        let mut at = 0;
        while at < self.active.len() {
            match ends(&self.active[at]) {
                Some(end) => {
                    let active = self.active.remove(at);
                    self.finish(active, end);
                }
                None => at += 1,
            }
        }
    }

    fn end_all(&mut self, error: &GenerateError) {
        self.end_where(|_| Some(Err(error.clone())));
    }

    /// Hands out a job's outcome and keeps its sequence.
    fn finish(&mut self, mut active: Active, end: Ended) {
        let outcome = end.map(|finish| active.generated(finish));
        let keep = match &outcome {
            Ok(reply) => {
                self.counters.finished += 1;
                self.counters.reply_tokens += reply.reply_ids.len() as u64;
                true
            }
            Err(GenerateError::Cancelled) => {
                self.counters.cancelled += 1;
                true
            }
            Err(GenerateError::Late { .. }) => {
                self.counters.late += 1;
                true
            }
            Err(_) => false,
        };
        if let (true, Some(sequence)) = (keep && active.keep, active.sequence.take()) {
            self.prefixes
                .put(&active.job.student, active.job.key, sequence);
        }
        active.ticket.end(outcome);
        active.hold = None;
        if active.job.background {
            return;
        }
        let number = active.ticket.number();
        // What the host does there must not cost anybody else's answer.
        if catch_unwind(AssertUnwindSafe(|| (self.on_done)(number))).is_err() {
            tracing::error!(job = number, "the engine's end-of-job callback panicked");
        }
    }

    fn publish(&mut self, shared: &Shared) {
        let running = self
            .active
            .iter()
            .filter(|active| active.began.is_some())
            .count() as u64;
        self.counters.running = running;
        self.counters.cache_bytes = self.prefixes.bytes() as u64;
        self.counters.prefill_tok_s = self.prefill.rate();
        self.counters.decode_tok_s = self.decode.rate();
        let arrived = locked(&shared.inbox).jobs.len() as u64;
        self.counters.waiting = self.active.len() as u64 - running + arrived;
        locked(&shared.counters).clone_from(&self.counters);
    }
}
