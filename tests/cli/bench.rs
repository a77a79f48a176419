//! `locum bench` on the tiny model: every kind of measurement runs and says what it measured.

use super::World;

#[test]
fn every_bench_measures_what_it_names() {
    let world = World::new();
    let tiny = world.path("tiny");
    std::fs::create_dir(&tiny).unwrap();
    locum_core::model::write_tiny(&tiny, 5).unwrap();
    let tiny = tiny.to_str().unwrap();

    let decide = world.json(&["bench", "decide", "--model", tiny, "--tokens", "300"]);
    assert_eq!(decide["decisions"], 300);
    assert!(
        decide["training_p99_us"].as_f64().unwrap() > 0.0,
        "{decide}"
    );
    assert!(decide["trained_tokens"].as_u64().unwrap() > 0, "{decide}");
    assert!(decide["hook"]["calls"].as_u64().unwrap() > 600, "{decide}");

    let engine = world.json(&[
        "bench",
        "--model",
        tiny,
        "--runs",
        "2",
        "--tokens",
        "16",
        "--threads",
        "2",
    ]);
    let rows = engine["rows"].as_array().unwrap();
    let named: Vec<String> = rows
        .iter()
        .map(|r| {
            format!(
                "{} {}",
                r["what"].as_str().unwrap(),
                r["weights"].as_str().unwrap()
            )
        })
        .collect();
    for what in ["prefill 16", "decode 16", "decode 8 x 16"] {
        for weights in ["bf16", "q8", "q4"] {
            assert!(named.contains(&format!("{what} {weights}")), "{named:?}");
        }
    }
    assert!(
        rows.iter().all(|r| r["tok_s"].as_f64().unwrap() > 0.0),
        "{rows:?}"
    );
    assert_eq!(engine["threads"], 2);

    for method in ["lora", "upper", "full"] {
        let train = world.json(&[
            "bench", "train", "--method", method, "--model", tiny, "--runs", "2", "--tokens", "24",
        ]);
        let losses = train["losses"].as_array().unwrap();
        assert_eq!((losses.len(), train["method"].as_str()), (4, Some(method)));
        assert!(train["tok_s"].as_f64().unwrap() > 0.0);
    }
    let train = world.json(&[
        "bench", "train", "--model", tiny, "--runs", "2", "--tokens", "64", "--shared", "75",
    ]);
    assert_eq!(train["tokens_saved"], 3.0 * 48.0);
    assert!(train["times_as_fast"].as_f64().unwrap() > 0.0);
}

#[test]
fn recording_is_measured_beside_the_disk_and_plain_sqlite() {
    let world = World::new();
    let record = world.json(&["bench", "record", "--tokens", "500"]);
    for part in ["record", "message", "message_long", "durable", "fdatasync"] {
        assert!(record[part]["p99_us"].as_f64().unwrap() > 0.0, "{record}");
    }
    // How often the core was away is counted beside each, whether or not it was.
    for part in ["record", "message", "message_long"] {
        let away = &record[part]["away"];
        let (times, each) = (away["a_second"].as_f64(), away["p50_us"].as_f64());
        assert!(times.unwrap() == 0.0 || each.unwrap() > 0.0, "{record}");
    }
    for rate in [
        "sustained_steps_s",
        "sqlite_single_rows_s",
        "sqlite_grouped_rows_s",
    ] {
        assert!(record[rate].as_f64().unwrap() > 0.0, "{record}");
    }
    let flood = &record["flood"];
    assert_eq!(
        flood["busy"], flood["stats_busy"],
        "each refusal is counted"
    );
    assert!(flood["taken"].as_u64().unwrap() > 0);
}

#[test]
fn what_learning_costs_is_measured_where_something_is_learned() {
    let world = World::new();
    let tiny = world.path("tiny");
    std::fs::create_dir(&tiny).unwrap();
    locum_core::model::write_tiny(&tiny, 5).unwrap();
    let tiny = tiny.to_str().unwrap();
    let ttt = world.json(&[
        "bench", "ttt", "--model", tiny, "--runs", "1", "--tokens", "768",
    ]);
    let row = &ttt["rows"][0];
    assert_eq!(row["weights"], "q8");
    assert_eq!(row["prefill"].as_array().map(Vec::len), Some(2));
    for key in [
        "mean_ratio",
        "p99_ratio",
        "edge_ratio",
        "longest_edge_ratio",
    ] {
        assert!(row["decode"][key].as_f64().unwrap() > 0.0, "{ttt}");
    }
    assert_eq!(row["decode"]["edges"], 3);
    assert!(row["decode"]["fast_bytes"].as_u64().unwrap() > 0);
    let short = world.run(&["bench", "ttt", "--model", tiny, "--tokens", "100"]);
    assert_ne!(short.code(), 0);

    let split = world.json(&[
        "bench",
        "split",
        "--model",
        tiny,
        "--runs",
        "1",
        "--tokens",
        "300,5000",
        "--threads",
        "2",
    ]);
    let rows = split["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[3]["tokens"]), (4, &5000.into()));
    for row in rows {
        assert!(row["speed_up"].as_f64().unwrap() > 0.0, "{split}");
    }
    let none = world.run(&["bench", "split", "--model", tiny, "--tokens", "200"]);
    assert_ne!(none.code(), 0, "no chunk is full, so nothing was learned");
}

#[test]
fn benches_through_the_door_get_answers() {
    let world = World::new();
    let tiny = world.path("tiny");
    std::fs::create_dir(&tiny).unwrap();
    locum_core::model::write_tiny(&tiny, 5).unwrap();
    let tiny = tiny.to_str().unwrap();
    world.json(&["model", "import", tiny]);

    // It once asked a policy that always says teacher.
    let answer = world.json(&["bench", "answer", "--runs", "1", "--tokens", "16"]);
    assert!(answer["decode_tok_s"]["median"].as_f64().unwrap() > 0.0);

    let step = world.json(&["bench", "step", "--model", tiny, "--runs", "2"]);
    let rows = step["rows"].as_array().unwrap();
    assert_eq!(
        (&rows[0]["turn"], &rows[1]["turn"]),
        (&2.into(), &20.into())
    );
    assert!(step["ratio"].as_f64().unwrap() > 0.0, "{step}");

    let serve = world.json(&[
        "bench",
        "serve-while-training",
        "--model",
        tiny,
        "--tokens",
        "12",
    ]);
    assert_eq!(serve["steps"], 12);
    for key in ["idle_p99_ms", "training_p99_ms", "ratio"] {
        assert!(serve[key].as_f64().unwrap() > 0.0, "{serve}");
    }
    let students = world.json(&["students"]);
    assert_eq!(students["students"].as_array().map(Vec::len), Some(0));
}

#[test]
fn an_older_processor_is_played_only_where_the_bench_is_told_to() {
    let world = World::new();
    let tiny = world.path("tiny");
    std::fs::create_dir(&tiny).unwrap();
    locum_core::model::write_tiny(&tiny, 5).unwrap();
    let path = |isa: &str| {
        let bench = world.json(&[
            "bench",
            "decode",
            "--model",
            tiny.to_str().unwrap(),
            "--weights",
            "q8",
            "--runs",
            "1",
            "--tokens",
            "4",
            "--isa",
            isa,
        ]);
        bench["rows"][0]["kernels"].as_str().unwrap().to_string()
    };
    assert_eq!(path("scalar"), "Scalar");
    assert!(["Avx2", "Scalar"].contains(&path("avx2").as_str()));
}

#[test]
fn the_quality_of_fewer_bits_is_measured_on_recorded_steps() {
    let world = World::new();
    let tiny = world.path("tiny");
    std::fs::create_dir(&tiny).unwrap();
    locum_core::model::write_tiny(&tiny, 5).unwrap();
    let tiny = tiny.to_str().unwrap();
    let none = world.run(&["bench", "quality", "--model", tiny]);
    assert_eq!(none.code(), 1);
    assert!(
        none.stderr().contains("there is no store"),
        "{}",
        none.stderr()
    );

    let file = world.episodes_file(30);
    world.json(&["episodes", "import", &file]);
    let quality = world.json(&["bench", "quality", "--model", tiny]);
    let rows = quality["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[0]["weights"], "f32");
    assert_eq!(
        (rows[0]["kl_nats"].as_f64(), rows[0]["same_steps"].as_f64()),
        (Some(0.0), Some(1.0))
    );
    let kl = |i: usize| rows[i]["kl_nats"].as_f64().unwrap();
    assert!(kl(1) < kl(2) && kl(2) < kl(3), "bf16, q8, q4: {rows:?}");
}
