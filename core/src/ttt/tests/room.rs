//! What the room promises beside the reference values, against the rule written as attention in f64.

use serde_json::json;

use crate::kernels::{Pool, Random};
use crate::ttt::{
    self, Chunk, FastWeight, Forgetting, StartWeight, TttConfig, TttError, TttGrad, TttLayer,
    TttMode, TttTarget,
};

/// The published rule and those that forget.
const RULES: [Forgetting; 4] = [
    Forgetting::Nothing,
    Forgetting::Decay(0.7),
    Forgetting::Delta(0.8),
    Forgetting::Delta(3.0),
];

/// Numbers of one layer and one sequence.
#[derive(Clone)]
struct Layer {
    config: TttConfig,
    d: usize,
    f: usize,
    w: Vec<f32>,
    conv: Vec<f32>,
    proj: Option<Vec<f32>>,
    z: Vec<f32>,
    u: Vec<f32>,
}

impl Layer {
    fn new(d: usize, f: usize, c: usize, t: usize, proj: bool) -> Self {
        let mut random = Random::new((d * 1000 + t) as u64);
        let mut numbers = |n: usize, size: f64| -> Vec<f32> {
            (0..n).map(|_| (size * random.normal()) as f32).collect()
        };
        let config = TttConfig {
            chunk_len: c,
            lr: 0.1,
            proj,
            max_drift: None,
            ..TttConfig::default()
        };
        Self {
            d,
            f,
            w: numbers(d * f, 0.3),
            conv: numbers(d * config.kernel_size, 0.5),
            proj: proj.then(|| numbers(d * d, 0.5)),
            z: numbers(t * f, 0.5),
            u: numbers(t * d, 0.5),
            config,
        }
    }

    fn tensors(&self) -> TttLayer<'_> {
        TttLayer::new(&self.config, self.d, &self.conv, self.proj.as_deref()).unwrap()
    }

    fn fast(&self) -> FastWeight {
        FastWeight::new(&StartWeight::new(self.w.clone().into(), self.d))
    }

    fn len(&self) -> usize {
        self.u.len() / self.d
    }

    fn whole(&self) -> Vec<f32> {
        let mut y = vec![0.0; self.u.len()];
        ttt::forward(
            None,
            &self.config,
            self.tensors(),
            &self.w,
            (&self.z, &self.u),
            &mut y,
        );
        y
    }

    /// Tokens `from..to` behind what the state has read.
    fn read(&self, fast: &mut FastWeight, from: usize, to: usize) -> Vec<f32> {
        let mut y = vec![0.0; (to - from) * self.d];
        let (z, u) = (
            &self.z[from * self.f..to * self.f],
            &self.u[from * self.d..to * self.d],
        );
        fast.forward(None, &self.config, self.tensors(), z, u, &mut y);
        y
    }

    /// `y_n = W₀ z_n + η Σ γᵉ v_m ⟨z_m, z_n⟩` over the tokens m of earlier chunks, with e edges since m, and with
    /// `v_m − β/(η c) Σ v_l ⟨z_l, z_m⟩/‖z_m‖²` over the tokens l of chunks before m's in the place of v_m under a delta rule.
    fn slow(&self) -> Vec<f64> {
        let (d, f, c, t) = (self.d, self.f, self.config.chunk_len, self.len());
        let k = self.config.kernel_size;
        let at = |x: &[f32], i: usize| f64::from(x[i]);
        let mut v = vec![0f64; t * d];
        for m in 0..t {
            let conv: Vec<f64> = (0..d)
                .map(|ch| {
                    (0..k)
                        .filter_map(|i| {
                            let from = (m + i).checked_sub(k / 2)?;
                            let inside = from < t && from / c == m / c;
                            inside.then(|| at(&self.conv, ch * k + i) * at(&self.u, from * d + ch))
                        })
                        .sum()
                })
                .collect();
            for o in 0..d {
                v[m * d + o] = match &self.proj {
                    None => conv[o],
                    Some(p) => (0..d).map(|i| conv[i] * at(p, i * d + o)).sum(),
                };
            }
        }
        let near = |m: usize, n: usize| -> f64 {
            let pairs = (0..f).map(|i| at(&self.z, m * f + i) * at(&self.z, n * f + i));
            pairs.sum()
        };
        let (decay, delta) = match self.config.forgets {
            Forgetting::Nothing => (1.0, 0.0),
            Forgetting::Decay(kept) => (f64::from(kept), 0.0),
            Forgetting::Delta(strength) => (1.0, f64::from(strength)),
        };
        for m in 0..t {
            for l in 0..m / c * c {
                let share = delta / c as f64 * near(l, m) / near(m, m);
                for o in 0..d {
                    v[m * d + o] -= share * v[l * d + o];
                }
            }
        }
        let mut y = vec![0f64; t * d];
        for n in 0..t {
            for o in 0..d {
                y[n * d + o] = (0..f)
                    .map(|i| at(&self.w, o * f + i) * at(&self.z, n * f + i))
                    .sum();
            }
            for m in 0..n / c * c {
                let left = decay.powi((n / c - m / c) as i32) * near(m, n);
                for o in 0..d {
                    y[n * d + o] += f64::from(self.config.lr) * v[m * d + o] * left;
                }
            }
        }
        y
    }
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let near = (got - want).abs() <= tolerance * size;
        assert!(near, "{what}[{i}]: {got} instead of {want}, largest {size}");
    }
}

#[test]
fn whole_sequences_agree_with_the_rule_written_as_attention() {
    for (d, f, c, t, proj) in [
        (1, 1, 1, 4, true),
        (4, 6, 3, 2, true),
        (7, 11, 5, 5, false),
        (7, 11, 5, 23, true),
        (16, 24, 8, 64, true),
        (20, 33, 2, 13, false),
    ] {
        let mut layer = Layer::new(d, f, c, t, proj);
        for rule in RULES {
            layer.config.forgets = rule;
            let want: Vec<f32> = layer.slow().iter().map(|y| *y as f32).collect();
            close("whole", &layer.whole(), &want, 1e-5);
            close("calls", &layer.read(&mut layer.fast(), 0, t), &want, 1e-5);
        }
    }
}

#[test]
fn a_decay_of_1_and_a_delta_of_0_are_the_published_rule_and_one_of_0_never_learned() {
    let mut layer = Layer::new(12, 20, 5, 43, true);
    let published = layer.whole();
    layer.config.forgets = Forgetting::Delta(0.0);
    assert_eq!(layer.whole(), published);
    layer.config.forgets = Forgetting::Decay(1.0);
    close("decay of 1", &layer.whole(), &published, 1e-6);
    layer.config.forgets = Forgetting::Decay(0.0);
    let mut fast = layer.fast();
    layer.read(&mut fast, 0, 43);
    assert_eq!((fast.drift(), fast.weight()), (0.0, &layer.w[..]));
}

#[test]
fn what_is_read_again_is_written_over_by_a_delta_rule_and_piles_up_without() {
    let mut layer = Layer::new(6, 9, 4, 4, true);
    // The same direction in every row, and every chunk the same.
    let row = layer.z[..9].to_vec();
    layer.z = row.repeat(40);
    layer.u = layer.u.repeat(10);
    layer.config.lr = 0.01;
    let drift = |forgets| {
        let mut layer = layer.clone();
        layer.config.forgets = forgets;
        let mut fast = layer.fast();
        let edges = (0..10).map(|i| {
            layer.read(&mut fast, 4 * i, 4 * i + 4);
            fast.drift()
        });
        edges.collect::<Vec<f32>>()
    };
    let (sum, delta) = (drift(Forgetting::Nothing), drift(Forgetting::Delta(1.0)));
    assert!((sum[9] / sum[0] - 10.0).abs() < 1e-3, "{sum:?}");
    // All of a chunk's rows share one direction, so a strength of 1 forgets all of it.
    assert!((delta[9] / delta[0] - 1.0).abs() < 1e-3, "{delta:?}");
    // The sum of 1 + 1/2 + 1/4 and so on, less what the last edge took.
    let decay = drift(Forgetting::Decay(0.5));
    assert!((decay[9] / sum[0] - 1.0).abs() < 2e-3, "{decay:?}");
}

#[test]
fn any_way_of_cutting_a_sequence_into_calls_gives_the_same_answers() {
    let mut layer = Layer::new(12, 20, 5, 43, true);
    let mut random = Random::new(7);
    for turn in 0..60 {
        layer.config.forgets = RULES[turn % RULES.len()];
        let whole = layer.whole();
        let (mut fast, mut got, mut at) = (layer.fast(), Vec::new(), 0);
        while at < 43 {
            let to = (at + random.below(14)).min(43);
            got.extend(layer.read(&mut fast, at, to));
            at = to;
            if random.below(3) == 0 {
                fast.work_ahead(None, &layer.config, layer.tensors(), random.below(4));
            }
        }
        close("calls", &got, &whole, 1e-5);
        assert_eq!((fast.position(), fast.waiting()), (43, 3));
    }
}

#[test]
fn a_pool_and_sequences_side_by_side_change_no_more_than_rounding() {
    let layer = Layer::new(96, 300, 16, 70, true);
    let whole = layer.whole();
    let pool = Pool::new(3, 0);
    let (mut a, mut b) = (layer.fast(), layer.fast());
    layer.read(&mut b, 0, 30);
    // `a` reads all 70, `b` its last 40.
    let (z, u) = (
        [&layer.z[..], &layer.z[30 * 300..]].concat(),
        [&layer.u[..], &layer.u[30 * 96..]].concat(),
    );
    let mut y = vec![0.0; u.len()];
    let mut batch = [(&mut a, 70), (&mut b, 40)];
    let io = (&z[..], &u[..], &mut y[..]);
    let updates = ttt::forward_rows(Some(&pool), &layer.config, layer.tensors(), &mut batch, io);
    close("first", &y[..70 * 96], &whole, 1e-5);
    close("second", &y[70 * 96..], &whole[30 * 96..], 1e-5);
    let made: Vec<_> = updates
        .iter()
        .map(|(i, update)| (*i, update.position))
        .collect();
    assert_eq!(
        made,
        [
            (0, 16),
            (0, 32),
            (0, 48),
            (0, 64),
            (1, 32),
            (1, 48),
            (1, 64)
        ]
    );
    close("fast weights", a.weight(), b.weight(), 1e-5);
}

#[test]
fn the_first_chunk_is_the_plain_product_bit_for_bit_and_so_is_everything_with_a_filter_of_zeros() {
    let mut layer = Layer::new(12, 20, 8, 40, true);
    let plain = |from: usize, to: usize| {
        let mut y = vec![0.0; (to - from) * 12];
        ttt::down(
            None,
            &layer.z[from * 20..to * 20],
            &layer.w,
            (12, 20),
            &mut y,
        );
        y
    };
    assert_eq!(layer.read(&mut layer.fast(), 0, 8), plain(0, 8));
    let single: Vec<f32> = (0..8).flat_map(|i| plain(i, i + 1)).collect();
    let mut fast = layer.fast();
    let got: Vec<f32> = (0..8)
        .flat_map(|i| layer.read(&mut fast, i, i + 1))
        .collect();
    assert_eq!(got, single);
    assert!(!fast.is_start(), "the chunk was full");
    let plain: Vec<f32> = (0..5).flat_map(|i| plain(i * 8, i * 8 + 8)).collect();
    layer.conv.fill(0.0);
    let mut fast = layer.fast();
    assert_eq!(layer.read(&mut fast, 0, 40), plain);
    assert!(fast.is_start() && fast.drift() == 0.0);
}

#[test]
fn a_clone_restores_and_a_cut_goes_back_to_the_edge_and_no_further() {
    let layer = Layer::new(12, 20, 8, 40, true);
    let mut fast = layer.fast();
    layer.read(&mut fast, 0, 19);
    let snapshot = fast.clone();
    let straight = layer.read(&mut fast, 19, 40);
    let mut restored = snapshot.clone();
    assert_eq!(layer.read(&mut restored, 19, 40), straight);
    assert_eq!(restored.weight(), fast.weight());
    assert_eq!(snapshot.position(), 19);

    // Other tokens after position 17, with work done ahead, then cancelled.
    let mut fast = snapshot.clone();
    let mut other = layer.clone();
    other.u.iter_mut().for_each(|u| *u = -*u);
    other.read(&mut fast, 19, 23);
    assert_eq!(
        fast.work_ahead(None, &layer.config, layer.tensors(), usize::MAX),
        5
    );
    fast.truncate(&layer.config, 17).unwrap();
    layer.read(&mut fast, 17, 19);
    assert_eq!(layer.read(&mut fast, 19, 40), straight);

    let refused = fast.truncate(&layer.config, 39);
    assert_eq!(
        refused,
        Err(TttError::BehindEdge {
            asked: 39,
            edge: 40
        })
    );
    assert_eq!(fast.position(), 40);
    fast.truncate(&layer.config, 40).unwrap();
}

#[test]
fn drift_is_the_relative_change_and_its_cap_begins_again_from_the_trained_weight() {
    let mut layer = Layer::new(12, 20, 8, 40, true);
    let mut fast = layer.fast();
    let updates = {
        let mut y = vec![0.0; layer.u.len()];
        fast.forward(
            None,
            &layer.config,
            layer.tensors(),
            &layer.z,
            &layer.u,
            &mut y,
        )
    };
    let norm =
        |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let change = norm(&mut fast.weight().iter().zip(&layer.w).map(|(a, b)| a - b));
    let want = change / norm(&mut layer.w.iter().copied());
    assert!((f64::from(fast.drift()) - want).abs() < 1e-6 * want);
    assert_eq!(updates.len(), 5);
    assert!(updates
        .iter()
        .all(|update| !update.tripped && update.drift > 0.0));

    // Between the drift after the first chunk and that after the second.
    assert!(updates[1].drift > updates[0].drift);
    layer.config.max_drift = Some((updates[0].drift + updates[1].drift) / 2.0);
    let mut fast = layer.fast();
    let mut y = vec![0.0; 16 * 12];
    let (z, u) = (&layer.z[..16 * 20], &layer.u[..16 * 12]);
    let updates = fast.forward(None, &layer.config, layer.tensors(), z, u, &mut y);
    assert_eq!([updates[0].tripped, updates[1].tripped], [false, true]);
    assert!(fast.is_start() && fast.drift() == 0.0);
    // Learning goes on, on the same grid.
    layer.read(&mut fast, 16, 24);
    assert!(!fast.is_start());
}

#[test]
fn an_update_that_is_no_number_trips_without_a_cap_too() {
    let mut layer = Layer::new(4, 6, 3, 6, false);
    layer.u[4] = f32::NAN;
    let mut fast = layer.fast();
    let mut y = vec![0.0; 24];
    let (z, u) = (&layer.z, &layer.u);
    let updates = fast.forward(None, &layer.config, layer.tensors(), z, u, &mut y);
    assert_eq!([updates[0].tripped, updates[1].tripped], [true, false]);
    assert!(updates[0].drift.is_nan() && updates[1].drift > 0.0);
    assert!(y.iter().all(|y| y.is_finite()), "{y:?}");
}

#[test]
fn a_chunk_that_was_not_read_whole_is_not_learned_from() {
    let layer = Layer::new(4, 6, 4, 16, true);
    for stop in [FastWeight::reset as fn(&mut FastWeight), |fast| {
        fast.skip(0)
    }] {
        let mut fast = layer.fast();
        layer.read(&mut fast, 0, 2);
        stop(&mut fast);
        let skipped = fast.waiting() == 2;
        if skipped {
            fast.skip(1);
            layer.read(&mut fast, 3, 7);
        } else {
            layer.read(&mut fast, 2, 7);
        }
        assert!(fast.is_start(), "the chunks at 0 and 4 are not full");
        layer.read(&mut fast, 7, 8);
        // The chunk at 4 is, and it is the only one learned from.
        let mut later = layer.fast();
        later.skip(4);
        layer.read(&mut later, 4, 8);
        close("fast weight", fast.weight(), later.weight(), 1e-6);
        assert!(!fast.is_start());
    }
}

#[test]
fn in_the_gradient_mode_the_caller_steps_at_the_edge_under_the_same_cap() {
    let mut layer = Layer::new(4, 6, 3, 6, true);
    layer.config.mode = TttMode::Gradient;
    let mut fast = layer.fast();
    let config = &layer.config;
    let rows = |from: usize, to: usize| (&layer.z[from * 6..to * 6], &layer.u[from * 4..to * 4]);
    let (z, u) = rows(0, 2);
    assert_eq!(
        fast.absorb(None, config, layer.tensors(), z, u),
        Chunk::Waits
    );
    let (z, u) = rows(2, 3);
    assert_eq!(fast.absorb(None, config, layer.tensors(), z, u), Chunk::Due);
    assert!(fast.is_start() && fast.waiting() == 0);
    let dw = vec![0.5; 24];
    let update = fast.descend(None, config, &dw);
    assert_eq!((update.position, update.tripped), (3, false));
    for (now, start) in fast.weight().iter().zip(&layer.w) {
        assert_eq!(*now, start + -config.lr * 0.5);
    }
    let capped = TttConfig {
        max_drift: Some(1e-3),
        ..config.clone()
    };
    let update = fast.descend(None, &capped, &dw);
    assert!(update.tripped && fast.is_start());
    // A decay works here too: half of the step is left behind its edge.
    let decays = TttConfig {
        forgets: Forgetting::Decay(0.5),
        ..config.clone()
    };
    fast.descend(None, &decays, &dw);
    for (now, start) in fast.weight().iter().zip(&layer.w) {
        assert!((now - start + config.lr * 0.25).abs() < 1e-6);
    }
}

#[test]
fn gradients_agree_with_finite_differences_of_the_rule_written_as_attention() {
    let shapes = [
        (5, 7, 4, 14, true),
        (6, 4, 3, 12, false),
        (3, 5, 8, 6, true),
    ];
    let cases = RULES
        .into_iter()
        .flat_map(|r| shapes.map(|s| (r, s, false)));
    // A filter that writes nothing yet, as every training begins.
    let begins = RULES.map(|rule| (rule, (5, 7, 4, 18, true), true));
    for (rule, (d, f, c, t, proj), begins) in cases.chain(begins) {
        let mut layer = Layer::new(d, f, c, t, proj);
        layer.config.forgets = rule;
        if begins {
            layer.conv.fill(0.0);
        }
        let mut random = Random::new(3);
        let dy: Vec<f32> = (0..t * d).map(|_| random.normal() as f32).collect();
        let loss = |layer: &Layer| -> f64 {
            layer
                .slow()
                .iter()
                .zip(&dy)
                .map(|(y, dy)| y * f64::from(*dy))
                .sum()
        };
        let (mut dz, mut du, mut dw) = (vec![0.0; t * f], vec![0.0; t * d], vec![0.0; d * f]);
        let (mut dconv, mut dproj) = (vec![0.0; layer.conv.len()], vec![0.0; d * d]);
        let grad = TttGrad {
            dz: &mut dz,
            du: Some(&mut du),
            dw: Some(&mut dw),
            dconv: Some(&mut dconv),
            dproj: proj.then_some(&mut dproj[..]),
        };
        let io = (&layer.z[..], &layer.u[..], &dy[..]);
        ttt::backward(None, &layer.config, layer.tensors(), &layer.w, io, grad);
        type Field = fn(&mut Layer) -> &mut Vec<f32>;
        let fields: [(&str, &[f32], Field); 5] = [
            ("z", &dz, |l| &mut l.z),
            ("u", &du, |l| &mut l.u),
            ("w", &dw, |l| &mut l.w),
            ("conv", &dconv, |l| &mut l.conv),
            ("proj", &dproj, |l| l.proj.as_mut().unwrap()),
        ];
        for (name, grad, field) in fields.into_iter().take(4 + usize::from(proj)) {
            for (i, grad) in grad.iter().enumerate() {
                // Steps that f32 holds exactly: the tensors are f32 and the slow rule is f64.
                let at = |step: f32| {
                    let mut layer = layer.clone();
                    let x = &mut field(&mut layer)[i];
                    let before = *x;
                    *x += step;
                    let moved = f64::from(*x) - f64::from(before);
                    (loss(&layer), moved)
                };
                let ((up, a), (down, b)) = (at(1e-3), at(-1e-3));
                let want = (up - down) / (a - b);
                let near = (f64::from(*grad) - want).abs() <= 1e-4 * (1.0 + want.abs());
                assert!(
                    near,
                    "d{name}[{i}], {t} tokens in chunks of {c}, {rule:?}: {grad} instead of {want}"
                );
            }
        }
        let moves = dconv.iter().any(|g| *g != 0.0);
        assert_eq!(
            moves,
            t > c,
            "the filter moves where a later chunk reads what it wrote"
        );
    }
}

#[test]
fn each_initial_value_is_the_base_model_and_moves_the_tensor_it_says() {
    let mut layer = Layer::new(6, 8, 4, 12, true);
    let published = layer.config.published_start(6, &mut Random::new(1));
    let next_token = layer.config.next_token_start(6);
    for ((conv, proj), moving) in [(published, (true, false)), (next_token, (false, true))] {
        (layer.conv, layer.proj) = (conv, proj);
        let mut fast = layer.fast();
        layer.read(&mut fast, 0, 12);
        assert!(fast.is_start());
        let (mut dz, mut dconv, mut dproj) = (vec![0.0; 12 * 8], vec![0.0; 30], vec![0.0; 36]);
        let grad = TttGrad {
            dz: &mut dz,
            du: None,
            dw: None,
            dconv: Some(&mut dconv),
            dproj: Some(&mut dproj),
        };
        let io = (&layer.z[..], &layer.u[..], &layer.u[..]);
        ttt::backward(None, &layer.config, layer.tensors(), &layer.w, io, grad);
        let moves = |grad: &[f32]| grad.iter().any(|g| *g != 0.0);
        assert_eq!((moves(&dconv), moves(&dproj)), moving);
    }
}

#[test]
fn configs_are_read_written_and_refused_by_field() {
    let raw = json!({"ttt_mode": true, "ttt_layers": [0, 6, 36], "ttt_chunk": 64, "ttt_lr": 0.3,
        "ttt_proj": false, "ttt_target": "input_embed"});
    let config = TttConfig::from_json(&raw, 36).unwrap().unwrap();
    assert_eq!(
        (&config.layers[..], config.chunk_len, config.lr),
        (&[0, 6][..], 64, 0.3)
    );
    assert_eq!((config.proj, config.target), (false, TttTarget::InputEmbed));
    let again = serde_json::Value::Object(config.to_json());
    assert_eq!(again["ttt_lr"], json!(0.3));
    assert_eq!(TttConfig::from_json(&again, 36).unwrap(), Some(config));
    let gradient = TttConfig::gradient(36, 64, 0.05);
    let again = serde_json::Value::Object(gradient.to_json());
    assert_eq!(TttConfig::from_json(&again, 36).unwrap(), Some(gradient));
    for (field, value, forgets) in [
        ("ttt_decay", 0.9, Forgetting::Decay(0.9)),
        ("ttt_delta", 2.0, Forgetting::Delta(2.0)),
    ] {
        let mut raw = raw.clone();
        raw[field] = json!(value);
        let config = TttConfig::from_json(&raw, 36).unwrap().unwrap();
        assert_eq!(config.forgets, forgets);
        let again = serde_json::Value::Object(config.to_json());
        assert_eq!(again[field], json!(value));
        assert_eq!(TttConfig::from_json(&again, 36).unwrap(), Some(config));
        raw["ttt_delta"] = json!(1);
        raw["ttt_decay"] = json!(1);
        let both = TttConfig::from_json(&raw, 36).unwrap_err();
        assert!(
            both.to_string().contains("ttt_delta beside ttt_decay"),
            "{both}"
        );
    }
    let delta = json!({"ttt_mode": "gradient", "ttt_delta": 1.0});
    let refused = TttConfig::from_json(&delta, 36).unwrap_err();
    assert!(refused.to_string().contains("ttt_delta"), "{refused}");
    let short = serde_json::json!({"ttt_mode": "gradient"});
    let read = TttConfig::from_json(&short, 10).unwrap().unwrap();
    assert_eq!((read.layers, read.mode), (vec![7, 8, 9], TttMode::Gradient));
    for plain in [
        json!({}),
        json!({"ttt_layers": []}),
        json!({"ttt_layers": [0], "ttt_mode": false}),
    ] {
        assert_eq!(TttConfig::from_json(&plain, 4).unwrap(), None, "{plain}");
    }
    for (field, value) in [
        ("ttt_chunk", json!(0)),
        ("ttt_chunk", json!(-8)),
        ("ttt_chunk", json!("8")),
        ("ttt_lr", json!("fast")),
        ("ttt_lr", json!(1e300)),
        ("ttt_target", json!("next_token")),
        ("ttt_decay", json!(1.5)),
        ("ttt_decay", json!("slow")),
        ("ttt_delta", json!(-1)),
        ("ttt_delta", json!(17)),
        ("ttt_layers", json!([4])),
        ("ttt_layers", json!(["0"])),
        ("ttt_layers", json!(0)),
        ("ttt_proj", json!(1)),
        ("ttt_mode", json!("yes")),
    ] {
        let mut raw = json!({"ttt_layers": [0]});
        raw[field] = value.clone();
        match TttConfig::from_json(&raw, 4) {
            Err(TttError::Config { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field} = {value}: {other:?}"),
        }
    }
}

#[test]
fn tensors_that_do_not_fit_the_layer_are_refused_by_name() {
    let config = TttConfig::default();
    let (conv, proj) = (vec![0.0; 20], vec![0.0; 16]);
    let check = |config: &TttConfig, conv: &[f32], proj: Option<&[f32]>| {
        TttLayer::new(config, 4, conv, proj)
            .map(|_| ())
            .map_err(|e| match e {
                TttError::Tensor { name, .. } => name,
                other => panic!("{other}"),
            })
    };
    let bare = TttConfig {
        proj: false,
        ..config.clone()
    };
    assert_eq!(check(&config, &conv, Some(&proj)), Ok(()));
    assert_eq!(check(&bare, &conv, None), Ok(()));
    assert_eq!(
        check(&config, &conv[1..], Some(&proj)),
        Err("mlp.ttt_conv.weight")
    );
    assert_eq!(
        check(&config, &conv, Some(&proj[1..])),
        Err("mlp.ttt_proj.weight")
    );
    assert_eq!(check(&config, &conv, None), Err("mlp.ttt_proj.weight"));
    assert_eq!(check(&bare, &conv, Some(&proj)), Err("mlp.ttt_proj.weight"));
}
