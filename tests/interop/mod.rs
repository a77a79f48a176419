//! What Locum itself makes of folders that Hugging Face's libraries open too; `check.py` asks and compares (`make interop`).

use std::path::{Path, PathBuf};

use locum_core::chat::Chat;
use locum_core::kernels::Pool;
use locum_core::model::{Model, Sequence};
use serde::Deserialize;
use serde_json::{json, Value};

/// One folder, and what is to be said of it.
#[derive(Deserialize)]
struct Question {
    folder: PathBuf,
    /// Folder for `logits.f32` and `said.json`.
    out: PathBuf,
    /// Logits are wanted for each of these tokens.
    ids: Vec<u32>,
    prompts: Vec<Vec<u32>>,
    /// Tokens to add to each prompt, the most likely one each time; no token ends the text.
    new_tokens: usize,
    texts: Vec<String>,
    chats: Vec<Vec<Value>>,
}

#[test]
fn folders_are_read_as_check_py_asks() {
    let Some(questions) = std::env::var_os("LOCUM_INTEROP") else {
        println!("skipped: LOCUM_INTEROP names no file of questions (`make interop` writes one)");
        return;
    };
    let questions: Vec<Question> =
        serde_json::from_slice(&std::fs::read(questions).unwrap()).unwrap();
    assert!(!questions.is_empty());
    let pool = Pool::new(2, 0);
    for question in questions {
        let model = Model::load(&question.folder).unwrap();
        let chat = Chat::load(&question.folder).unwrap();
        let logits = logits(&pool, &model, &question.ids);
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(question.out.join("logits.f32"), bytes).unwrap();
        let greedy: Vec<Vec<u32>> = question
            .prompts
            .iter()
            .map(|prompt| greedy(&pool, &model, prompt, question.new_tokens))
            .collect();
        let ids: Vec<Vec<u32>> = question
            .texts
            .iter()
            .map(|text| chat.tokenizer.encode(text, true))
            .collect();
        let rendered: Vec<[String; 2]> = question
            .chats
            .iter()
            .map(|chat_messages| {
                [true, false].map(|prompt| chat.template.render(chat_messages, prompt).unwrap())
            })
            .collect();
        let said = json!({"greedy": greedy, "ids": ids, "rendered": rendered, "eos": chat.eos_ids});
        write(&question.out.join("said.json"), &said);
    }
}

/// (t, v), through a cache fed in two calls, as the engine feeds it.
fn logits(pool: &Pool, model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut sequence = Sequence::new(&model.config, ids.len());
    let mut all = Vec::new();
    let (head, tail) = ids.split_at(ids.len() / 3);
    for part in [head, tail] {
        let x = model.step(pool, &mut [(&mut sequence, part)]).unwrap();
        all.extend(model.logits(pool, &x, &(0..part.len()).collect::<Vec<_>>()));
    }
    all
}

fn greedy(pool: &Pool, model: &Model, prompt: &[u32], new_tokens: usize) -> Vec<u32> {
    let mut sequence = Sequence::new(&model.config, prompt.len() + new_tokens);
    let (mut said, mut new) = (Vec::new(), prompt.to_vec());
    while said.len() < new_tokens {
        let x = model.step(pool, &mut [(&mut sequence, &new)]).unwrap();
        let logits = model.logits(pool, &x, &[new.len() - 1]);
        let best = (0..logits.len())
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
            .unwrap() as u32;
        said.push(best);
        new = vec![best];
    }
    said
}

fn write(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}
