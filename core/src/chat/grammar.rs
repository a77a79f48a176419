//! Grammars over the tokenizer's vocabulary: which tokens may come next in an answer, and which must.

use std::sync::{Arc, Mutex};

use llguidance::api::{GrammarInit, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use toktrie::{
    InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};

use super::{ChatError, Tokenizer};

/// Compiled grammars that are kept for the next answer with the same tools.
const MAX_KEPT: usize = 16;

/// The tokenizer as the grammar engine sees it.
struct Environment {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.tokenizer.encode(text, false))
    }
}

/// Compiles grammars and keeps the last few.
pub(super) struct Grammars {
    factory: ParserFactory,
    end_of_turn: u32,
    /// Newest last. Behind a lock because answers may begin on several threads.
    kept: Mutex<Vec<(String, Matcher)>>,
}

impl Grammars {
    pub fn new(tokenizer: Arc<Tokenizer>, end_of_turn: u32) -> Result<Grammars, ChatError> {
        let size = tokenizer.vocab_size() as u32;
        let words: Vec<Vec<u8>> = (0..size)
            .map(|id| {
                let bytes = tokenizer.bytes_of(id);
                if tokenizer.is_special(id) {
                    // The mark keeps grammars over text from ever reaching a special token.
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
                } else {
                    bytes.to_vec()
                }
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, end_of_turn), &words);
        let environment: TokEnv = Arc::new(Environment { tokenizer, trie });
        let capabilities = InferenceCapabilities {
            ff_tokens: true,
            ..InferenceCapabilities::default()
        };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&environment, capabilities, &slices).map_err(refuse)?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Grammars {
            factory,
            end_of_turn,
            kept: Mutex::new(Vec::new()),
        })
    }

    /// A fresh answer under the grammar.
    pub fn start(&self, lark: &str) -> Result<Grammar, ChatError> {
        let mut kept = self
            .kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let matcher = match kept.iter().position(|(source, _)| source == lark) {
            Some(at) => {
                let entry = kept.remove(at);
                let matcher = entry.1.deep_clone();
                kept.push(entry);
                matcher
            }
            None => {
                let grammar = GrammarInit::Serialized(TopLevelGrammar::from_lark(lark.to_string()));
                let parser = self
                    .factory
                    .create_parser_from_init(grammar, 0, 0)
                    .map_err(refuse)?;
                let mut matcher = Matcher::new(Ok(parser));
                // Work that the first mask needs is done once, here, instead of in every answer.
                matcher.compute_mask().map_err(refuse)?;
                let copy = matcher.deep_clone();
                if kept.len() == MAX_KEPT {
                    kept.remove(0);
                }
                kept.push((lark.to_string(), matcher));
                copy
            }
        };
        Ok(Grammar {
            matcher,
            mask: SimpleVob::new(),
            end_of_turn: self.end_of_turn,
            environment: self.factory.tok_env().clone(),
            ended: false,
        })
    }
}

/// One answer under a grammar. Belongs to one sequence; may move between threads.
pub struct Grammar {
    matcher: Matcher,
    mask: SimpleVob,
    end_of_turn: u32,
    environment: TokEnv,
    ended: bool,
}

impl Grammar {
    /// The tokens that may come next, as bits: token `t` is bit `t % 32` of word `t / 32`, over the tokenizer's vocabulary
    /// (a model with more rows has no tokens there). The end of the turn is among them where the answer may end; when
    /// nothing else may follow, it is the only one.
    ///
    /// # Errors
    /// [`ChatError::Grammar`] if the grammar engine gave up (a limit was met): the answer cannot go on.
    pub fn allowed(&mut self) -> Result<&[u32], ChatError> {
        self.mask = self.matcher.compute_mask_or_eos().map_err(refuse)?;
        Ok(self.mask.as_slice())
    }

    /// The same state, to come back to.
    pub fn fork(&self) -> Grammar {
        Grammar {
            matcher: self.matcher.deep_clone(),
            mask: self.mask.clone(),
            end_of_turn: self.end_of_turn,
            environment: self.environment.clone(),
            ended: self.ended,
        }
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// [`ChatError::NotAllowed`] if the mask does not hold it; the state is then as before.
    pub fn accept(&mut self, token: u32) -> Result<(), ChatError> {
        let refused = || ChatError::NotAllowed {
            token,
            text: self.environment.tok_trie().decode_str(&[token]),
        };
        if self.ended {
            return Err(refused());
        }
        if token == self.end_of_turn {
            if !self.matcher.is_stopped() && !self.matcher.is_accepting().map_err(refuse)? {
                return Err(refused());
            }
            self.ended = true;
            return Ok(());
        }
        if self.matcher.try_consume_tokens(&[token]).map_err(refuse)? == 0 {
            return Err(refused());
        }
        Ok(())
    }

    /// Takes and returns the tokens that are the only possibility from here on, as the tokenizer itself would write them;
    /// often none. They can be run through the model in one go. The end of the turn is not among them: see
    /// [`Grammar::is_done`].
    pub fn forced(&mut self) -> Vec<u32> {
        if self.ended || self.matcher.is_stopped() {
            return Vec::new();
        }
        self.matcher.consume_ff_tokens()
    }

    /// True if nothing but the end of the turn can follow, or it has been taken: the answer is complete.
    pub fn is_done(&self) -> bool {
        self.ended || (self.matcher.is_stopped() && !self.matcher.is_error())
    }

    /// True if the answer may end here.
    pub fn can_end(&mut self) -> bool {
        self.is_done() || self.matcher.is_accepting().unwrap_or(false)
    }
}

fn refuse(error: impl std::fmt::Display) -> ChatError {
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && *l != "<non-verbose/>")
        .collect();
    ChatError::Grammar(lines.join(" "))
}
