//! What is kept comes back bit for bit, and what was changed meanwhile is refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::model::{write_tiny, AdapterConfig, LINEARS};
use crate::view::View;

struct World {
    _dir: tempfile::TempDir,
    store: PathBuf,
    tiny: PathBuf,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let (store, tiny) = (dir.path().join("store"), dir.path().join("tiny"));
    fs::create_dir(&store).unwrap();
    write_tiny(&tiny, 1).unwrap();
    World {
        _dir: dir,
        store,
        tiny,
    }
}

fn tiny_model(world: &World) -> (Model, Chat) {
    let mut model = Model::load(&world.tiny).unwrap();
    model.round_to_bf16();
    (model, Chat::load(&world.tiny).unwrap())
}

/// A store with one student, and its manifest.
fn with_student() -> (World, Registry, Manifest) {
    let world = world();
    let (model, chat) = tiny_model(&world);
    let registry = Registry::open(&world.store).unwrap();
    let manifest = registry.save(&model, None, &chat, draft()).unwrap();
    (world, registry, manifest)
}

fn draft() -> Manifest {
    Manifest {
        base: "ab".repeat(32),
        base_name: "tiny".into(),
        view: View {
            steps_back: 3,
            ..View::default()
        },
        episodes: vec!["e1".into()],
        tool_names: ["act".to_string()].into(),
        method: "full".into(),
        curve: json!([[0, 2.5], [10, 1.25]]),
        train_seconds: 1.5,
        ..Manifest::default()
    }
}

fn bits(model: &Model) -> Vec<(String, Vec<u32>)> {
    let params = model.weights.params.iter();
    params
        .map(|(id, data)| (id.name(), data.iter().map(|x| x.to_bits()).collect()))
        .collect()
}

fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn refusal<T>(result: Result<T, RegistryError>) -> String {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(e) => e.to_string(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    all.sort();
    all
}

#[test]
fn an_imported_folder_is_the_default_base_and_loads_rounded_to_bf16() {
    let world = world();
    let base = import_base(&world.store, &world.tiny, None).unwrap();
    assert_eq!(
        (
            base.name.as_str(),
            base.architecture.as_str(),
            base.num_hidden_layers
        ),
        ("tiny", "LlamaForCausalLM", 2)
    );
    assert!(base.default && base.bytes > 2 * base.parameters);
    assert_eq!(list_bases(&world.store).unwrap(), [base]);

    let registry = Registry::open(&world.store).unwrap();
    let dir = registry.base_dir(None).unwrap().unwrap();
    assert_eq!(
        registry.base_dir(Some("tiny")).unwrap().as_ref(),
        Some(&dir)
    );
    assert_eq!(registry.base_dir(Some("other")).unwrap(), None);
    assert_eq!(
        fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
        0o700
    );
    let (model, chat, digest) = registry.load_base(&dir).unwrap();
    let (expected, expected_chat) = tiny_model(&world);
    assert_eq!(bits(&model), bits(&expected));
    assert_eq!(chat.digest(), expected_chat.digest());
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("locum-base.json")).unwrap()).unwrap();
    assert_eq!(
        (
            written["source"].as_str(),
            written["weights_sha256"].as_str()
        ),
        (Some("tiny"), Some(digest.as_str()))
    );

    // A folder outside of the store has a digest too, but of its own numbers.
    assert_ne!(registry.load_base(&world.tiny).unwrap().2, digest);
}

#[test]
fn a_base_is_imported_once_and_another_one_does_not_take_its_name() {
    let world = world();
    let first = import_base(&world.store, &world.tiny, Some("a")).unwrap();
    assert_eq!(
        import_base(&world.store, &world.tiny, Some("a")).unwrap(),
        first
    );
    write_tiny(&world.tiny, 2).unwrap();
    let sentence = refusal(import_base(&world.store, &world.tiny, Some("a")));
    assert!(
        sentence.contains("holds another base already"),
        "{sentence}"
    );
    assert!(
        !import_base(&world.store, &world.tiny, Some("b"))
            .unwrap()
            .default
    );
    assert_eq!(names(&world.store.join("base")), ["a", "b", "default"]);

    set_default_base(&world.store, "b").unwrap();
    let registry = Registry::open(&world.store).unwrap();
    assert!(registry.base_dir(None).unwrap().unwrap().ends_with("b"));
    assert!(refusal(set_default_base(&world.store, "c")).contains("no base is named \"c\""));
    fs::remove_dir_all(world.store.join("base/b")).unwrap();
    assert!(refusal(registry.base_dir(None)).contains("no base is named \"b\""));
}

#[test]
fn a_name_that_leaves_the_folder_is_refused() {
    let world = world();
    for name in ["", "..", "../x", "a/b", ".tmp-1-1", "default", "ä"] {
        assert!(refusal(import_base(&world.store, &world.tiny, Some(name)))
            .contains("cannot be a base's name"));
    }
    assert!(!world.store.join("base").exists());
}

#[test]
fn a_source_that_cannot_be_run_is_refused_with_a_sentence_and_leaves_nothing() {
    let world = world();
    let file = world.tiny.join("tokenizer.json");
    let sentence = refusal(import_base(&world.store, &file, None));
    assert!(sentence.contains("not a readable GGUF file"), "{sentence}");
    let gone = refusal(import_base(&world.store, Path::new("nowhere.gguf"), None));
    assert!(gone.contains("nowhere.gguf"), "{gone}");

    // A GGUF file of another architecture: magic, version 3, no tensors, one text.
    let mut gguf = b"GGUF\x03\0\0\0".to_vec();
    gguf.extend([0u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    for (before, text) in [(None, "general.architecture"), (Some(8u32), "mamba")] {
        gguf.extend(before.map(u32::to_le_bytes).iter().flatten());
        gguf.extend((text.len() as u64).to_le_bytes());
        gguf.extend(text.as_bytes());
    }
    let path = world.tiny.join("other.gguf");
    fs::write(&path, &gguf).unwrap();
    let sentence = refusal(import_base(&world.store, &path, None));
    assert!(
        sentence.contains("\"mamba\"") && sentence.contains("Llama- and Qwen3-type"),
        "{sentence}"
    );

    edit(&world.tiny.join("config.json"), |config| {
        config["model_type"] = json!("mamba")
    });
    let sentence = refusal(import_base(&world.store, &world.tiny, None));
    assert!(
        sentence.contains("\"mamba\"") && sentence.contains("Llama- and Qwen3-type"),
        "{sentence}"
    );
    assert!(list_bases(&world.store).unwrap().is_empty());
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let world = world();
    let (mut model, chat) = tiny_model(&world);
    model.config.vocab_size = 100;
    let registry = Registry::open(&world.store).unwrap();
    let sentence = refusal(registry.save(&model, None, &chat, draft()));
    assert!(
        sentence.contains("259 tokens") && sentence.contains("only 100"),
        "{sentence}"
    );
}

#[test]
fn a_gguf_file_becomes_a_base() {
    let Some(path) = std::env::var_os("LOCUM_TEST_GGUF") else {
        println!("skipped: LOCUM_TEST_GGUF names no file");
        return;
    };
    let world = world();
    let base = import_base(&world.store, Path::new(&path), Some("gguf")).unwrap();
    assert!(base.default && base.parameters > 1_000_000);
    let registry = Registry::open(&world.store).unwrap();
    let dir = registry.base_dir(None).unwrap().unwrap();
    let (model, chat, digest) = registry.load_base(&dir).unwrap();
    let gguf = crate::model::read_gguf(Path::new(&path)).unwrap();
    let mut expected = Model::new(gguf.config, gguf.weights).unwrap();
    expected.round_to_bf16();
    assert!(model
        .weights
        .params
        .iter()
        .all(|(id, data)| *data == expected.weights.params[id]));
    assert_eq!(
        chat.digest(),
        Chat::from_gguf(&gguf.metadata).unwrap().digest()
    );
    assert_eq!(digest.len(), 64);
}

#[test]
fn a_student_comes_back_bit_for_bit_with_its_manifest() {
    let (world, registry, manifest) = with_student();
    assert_eq!(
        (
            manifest.version,
            manifest.id.len(),
            manifest.schema.as_str()
        ),
        (1, 16, STUDENT_SCHEMA)
    );
    assert_eq!(manifest.view_digest, draft().view.digest());
    let (loaded, model, chat) = Registry::open(&world.store).unwrap().load(1).unwrap();
    let (expected, expected_chat) = tiny_model(&world);
    assert_eq!(loaded, manifest);
    assert_eq!(bits(&model), bits(&expected));
    assert_eq!(chat.digest(), expected_chat.digest());
    assert_eq!(registry.list().unwrap(), [manifest]);
    assert!(registry.bytes(1) > 0 && registry.bytes(2) == 0);
    assert!(refusal(registry.load(2)).contains("no student of version 2"));
}

#[test]
fn an_adapter_lies_beside_the_merged_weights() {
    let world = world();
    let (model, chat) = tiny_model(&world);
    let registry = Registry::open(&world.store).unwrap();
    let lora = Lora::new(
        &model.config,
        AdapterConfig {
            rank: 4,
            alpha: 8.0,
            seed: 1,
        },
        &LINEARS,
    );
    let manifest = registry.save(&model, Some(&lora), &chat, draft()).unwrap();
    let adapter = registry.student_dir(&manifest.id).join("adapter");
    assert_eq!(
        names(&adapter),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    registry.load(1).unwrap();
}

#[test]
fn versions_count_up_and_are_given_once() {
    let (world, registry, first) = with_student();
    let (model, chat) = tiny_model(&world);
    let sentence = refusal(registry.save(
        &model,
        None,
        &chat,
        Manifest {
            version: 1,
            ..draft()
        },
    ));
    assert_eq!(
        sentence,
        format!("version 1 is student {} already", first.id)
    );
    let second = registry
        .save(
            &model,
            None,
            &chat,
            Manifest {
                parent: Some(first.id.clone()),
                ..draft()
            },
        )
        .unwrap();
    assert_eq!((second.version, registry.next_version().unwrap()), (2, 3));
    assert_ne!(second.id, first.id);
    // One that served is counted also when its folder is gone.
    registry.set_current(Some(2)).unwrap();
    fs::remove_dir_all(registry.student_dir(&second.id)).unwrap();
    assert_eq!(registry.next_version().unwrap(), 3);
}

#[test]
fn a_flipped_byte_in_the_weights_is_refused() {
    let (_world, registry, manifest) = with_student();
    let path = registry.student_dir(&manifest.id).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let sentence = refusal(registry.load(1));
    assert!(
        sentence.contains("SHA-256 of the weights should be")
            && sentence.contains(&manifest.weights_sha256),
        "{sentence}"
    );
}

#[test]
fn a_flipped_byte_in_an_imported_base_is_refused() {
    let world = world();
    import_base(&world.store, &world.tiny, None).unwrap();
    let dir = world.store.join("base/tiny");
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let sentence = refusal(Registry::open(&world.store).unwrap().load_base(&dir));
    assert!(
        sentence.contains("SHA-256 of the weights should be"),
        "{sentence}"
    );
}

#[test]
fn truncated_files_are_refused() {
    for name in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "locum.json",
    ] {
        let (_world, registry, manifest) = with_student();
        let path = registry.student_dir(&manifest.id).join(name);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(registry.load(1).is_err(), "half of {name} was taken");
    }
}

#[test]
fn another_view_chat_or_method_than_the_student_was_made_with_is_refused() {
    let (_world, registry, manifest) = with_student();
    let dir = registry.student_dir(&manifest.id);
    let path = dir.join("locum.json");
    let whole = fs::read(&path).unwrap();
    edit(&path, |m| m["view"]["steps_back"] = json!(4));
    let sentence = refusal(registry.load(1));
    assert!(
        sentence.contains("view digest should be") && sentence.contains(&manifest.view_digest),
        "{sentence}"
    );

    fs::write(&path, &whole).unwrap();
    edit(&path, |m| m["tool_names"] = json!(["act", "delete_all"]));
    assert!(refusal(registry.load(1)).contains("the id should be"));

    fs::write(&path, &whole).unwrap();
    edit(&dir.join("tokenizer_config.json"), |c| {
        c["chat_template"] = json!(c["chat_template"]
            .as_str()
            .unwrap()
            .replace("role'] + '\\n'", "role'] + ':'")
            .replace("assistant\\n", "assistant:"))
    });
    let sentence = refusal(registry.load(1));
    assert!(
        sentence.contains("digest of tokenizer and chat template should be"),
        "{sentence}"
    );
}

#[test]
fn a_dataset_made_under_another_view_or_chat_gives_no_student() {
    let world = world();
    let (model, chat) = tiny_model(&world);
    let registry = Registry::open(&world.store).unwrap();
    let view = Manifest {
        view_digest: View::default().digest(),
        ..draft()
    };
    assert!(refusal(registry.save(&model, None, &chat, view)).contains("view digest should be"));
    let chat_digest = Manifest {
        chat_digest: "00".into(),
        ..draft()
    };
    assert!(refusal(registry.save(&model, None, &chat, chat_digest))
        .contains("chat digest should be 00"));
    assert!(registry.list().unwrap().is_empty());
}

#[test]
fn a_manifest_that_could_not_be_read_again_is_not_written() {
    let world = world();
    let (model, chat) = tiny_model(&world);
    let registry = Registry::open(&world.store).unwrap();
    let manifest = Manifest {
        train_seconds: f64::NAN,
        ..draft()
    };
    assert!(refusal(registry.save(&model, None, &chat, manifest)).contains("locum.json"));
    assert!(names(&world.store.join("students")).is_empty());
}

#[test]
fn a_damaged_student_does_not_hide_the_others() {
    let (_world, registry, manifest) = with_student();
    let empty = registry.student_dir("0123456789abcdef");
    fs::create_dir(&empty).unwrap();
    let foreign = registry.student_dir("fedcba9876543210");
    fs::create_dir(&foreign).unwrap();
    fs::copy(
        registry.student_dir(&manifest.id).join("locum.json"),
        foreign.join("locum.json"),
    )
    .unwrap();
    let (students, damaged) = registry.list_all().unwrap();
    assert_eq!(students, [manifest]);
    assert_eq!(
        damaged.iter().map(|(path, _)| path).collect::<Vec<_>>(),
        [&empty, &foreign]
    );
}

#[test]
fn the_current_student_and_the_way_back_survive_reopening() {
    let (world, registry, _) = with_student();
    let (model, chat) = tiny_model(&world);
    for _ in 0..2 {
        registry.save(&model, None, &chat, draft()).unwrap();
    }
    assert_eq!(
        (registry.current().unwrap(), registry.previous().unwrap()),
        (None, None)
    );
    for version in [1, 2, 2, 3] {
        registry.set_current(Some(version)).unwrap();
    }
    let registry = Registry::open(&world.store).unwrap();
    assert_eq!(
        (registry.current().unwrap(), registry.previous().unwrap()),
        (Some(3), Some(2))
    );
    // Going back twice does not come to the student that was left.
    registry.set_current(registry.previous().unwrap()).unwrap();
    assert_eq!(
        (registry.current().unwrap(), registry.previous().unwrap()),
        (Some(2), Some(1))
    );
    registry.set_current(registry.previous().unwrap()).unwrap();
    assert_eq!(
        (registry.current().unwrap(), registry.previous().unwrap()),
        (Some(1), None)
    );
    registry.set_current(None).unwrap();
    assert_eq!(
        (registry.current().unwrap(), registry.previous().unwrap()),
        (None, None)
    );
    assert!(refusal(registry.set_current(Some(9))).contains("no student of version 9"));
    fs::write(world.store.join("current.json"), "{").unwrap();
    assert!(refusal(registry.current()).contains("current.json is not what it should be"));
}

#[test]
fn leftovers_are_swept_and_folders_being_written_are_not() {
    let (world, _, manifest) = with_student();
    let students = world.store.join("students");
    let live = Temporary::new(&students).unwrap();
    for name in ["base/.tmp-1-0", "students/.tmp-1-0", "students/.tmp-77-3"] {
        fs::create_dir_all(world.store.join(name)).unwrap();
        fs::write(world.store.join(name).join("model.tmp"), [0; 10]).unwrap();
    }
    let registry = Registry::open(&world.store).unwrap();
    let live_name = live
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_string();
    assert_eq!(names(&students), [live_name, manifest.id.clone()]);
    assert!(names(&world.store.join("base")).is_empty());
    assert_eq!(registry.list().unwrap(), std::slice::from_ref(&manifest));
    drop(live);
    assert_eq!(names(&students), [manifest.id]);
}
