//! A Llama and Qwen3 decoder over the kernels with TTT layers, forward and backward, plain and slow: the reference values are those of
//! whole models.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::kernels::{
    add_in_place, attention, attention_backward, matmul, rms_norm, rms_norm_backward, rope,
    rope_backward, swiglu, swiglu_backward, AttentionGrad, AttentionShape, Mat, MatMut, RopeTable,
    Span, SpanRows,
};
use crate::ttt::{self, FastWeight, StartWeight, TttConfig, TttGrad, TttLayer, TttTarget, Update};

pub type Tensors = BTreeMap<String, Vec<f32>>;

const POSITIONS: usize = 128;

/// Tensors of a file by name; integers come as f32 too.
pub fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &String, dtype, data: &[u8]| match dtype {
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        Dtype::I64 => data
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32)
            .collect(),
        other => panic!("{name}: {other:?}"),
    };
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = read(&name, view.dtype(), view.data());
            (name, data)
        })
        .collect()
}

pub struct Decoder {
    pub raw: Value,
    pub ttt: TttConfig,
    /// Updates off: the plain model.
    pub off: bool,
    pub weights: Tensors,
    rope: RopeTable,
}

/// Keys, values and fast weights of one sequence.
#[derive(Clone)]
pub struct Past {
    pub pos: usize,
    kv: Vec<(Vec<f32>, Vec<f32>)>,
    pub fast: BTreeMap<usize, FastWeight>,
}

/// How the sequences of a batch are read.
pub enum How<'a> {
    /// Behind what each has read already.
    Serve(&'a mut [&'a mut Past]),
    /// From their beginning, with a tape of every block for the backward pass.
    Train(&'a mut Vec<Block>),
}

/// Activations of a block.
#[derive(Default, Clone)]
pub struct Block {
    x: Vec<f32>,
    n1: Vec<f32>,
    q_raw: Vec<f32>,
    k_raw: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    x2: Vec<f32>,
    pub n2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    pub act: Vec<f32>,
    pub mlp_out: Vec<f32>,
}

impl Decoder {
    pub fn load(folder: &Path) -> Self {
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let raw: Value = serde_json::from_str(&text).unwrap();
        let layers = raw["num_hidden_layers"].as_u64().unwrap() as usize;
        let ttt = TttConfig::from_json(&raw, layers).unwrap();
        // The vectors were made without a cap, and drift far beyond it on purpose.
        let ttt = TttConfig {
            max_drift: None,
            ..ttt.expect("a case has TTT layers")
        };
        let e = raw["head_dim"].as_u64().unwrap() as usize;
        let theta = raw["rope_theta"].as_f64().unwrap();
        let inv_freq: Vec<f64> = (0..e / 2)
            .map(|i| theta.powf(-2.0 * i as f64 / e as f64))
            .collect();
        Self {
            raw,
            ttt,
            off: false,
            weights: tensors(&folder.join("weights.safetensors")),
            rope: RopeTable::new(&inv_freq, POSITIONS),
        }
    }

    fn number(&self, name: &str) -> usize {
        self.raw[name].as_u64().unwrap() as usize
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape {
            num_attention_heads: self.number("num_attention_heads"),
            num_key_value_heads: self.number("num_key_value_heads"),
            head_dim: self.number("head_dim"),
        }
    }

    fn w(&self, layer: usize, name: &str) -> &[f32] {
        &self.weights[&format!("model.layers.{layer}.{name}.weight")]
    }

    fn eps(&self) -> f32 {
        self.raw["rms_norm_eps"].as_f64().unwrap() as f32
    }

    fn qwen3(&self) -> bool {
        self.raw["model_type"] == "qwen3"
    }

    fn head(&self) -> &'static str {
        match self.raw["tie_word_embeddings"].as_bool().unwrap() {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        }
    }

    fn learns(&self, layer: usize) -> bool {
        !self.off && self.ttt.layers.contains(&(layer as u16))
    }

    fn ttt_layer(&self, layer: usize) -> TttLayer<'_> {
        let proj = format!("model.layers.{layer}.mlp.ttt_proj.weight");
        let proj = self.weights.get(&proj).map(Vec::as_slice);
        let conv = self.w(layer, "mlp.ttt_conv");
        TttLayer::new(&self.ttt, self.number("hidden_size"), conv, proj).unwrap()
    }

    /// A sequence before its first token.
    pub fn past(&self) -> Past {
        let shape = self.shape();
        let kd = shape.num_key_value_heads * shape.head_dim;
        let start = |layer: usize| {
            let w = self.w(layer, "mlp.down_proj").to_vec();
            FastWeight::new(&StartWeight::new(w.into(), self.number("hidden_size")))
        };
        Past {
            pos: 0,
            kv: (0..self.number("num_hidden_layers"))
                .map(|_| {
                    (
                        vec![0.0; shape.keys().len(POSITIONS)],
                        vec![0.0; POSITIONS * kd],
                    )
                })
                .collect(),
            fast: self
                .ttt
                .layers
                .iter()
                .map(|&layer| (layer.into(), start(layer.into())))
                .collect(),
        }
    }

    /// New tokens of one sequence: logits (t, v).
    pub fn read(&self, past: &mut Past, ids: &[u32]) -> Vec<f32> {
        self.forward(&[ids], How::Serve(&mut [past])).0
    }

    /// Logits (t, v) of packed sequences, the last block's output (t, d), and the updates made.
    pub fn forward(&self, ids: &[&[u32]], mut how: How) -> (Vec<f32>, Vec<f32>, Vec<Update>) {
        let (d, f) = (self.number("hidden_size"), self.number("intermediate_size"));
        let shape = self.shape();
        let (h, g, e) = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        );
        let (qd, kd) = (h * e, g * e);
        let mut spans = Vec::new();
        let mut positions = Vec::new();
        for (i, ids) in ids.iter().enumerate() {
            let pos = match &how {
                How::Serve(pasts) => pasts[i].pos,
                How::Train(_) => 0,
            };
            spans.push((positions.len(), ids.len(), pos));
            positions.extend((pos..pos + ids.len()).map(|p| p as u32));
        }
        let t = positions.len();
        let embed = &self.weights["model.embed_tokens.weight"];
        let rows = ids.concat();
        let x0: Vec<f32> = rows
            .iter()
            .flat_map(|&id| embed[id as usize * d..][..d].iter().copied())
            .collect();
        let mut x = x0.clone();
        let mut updates = Vec::new();
        for layer in 0..self.number("num_hidden_layers") {
            let w = |name: &str| self.w(layer, name);
            let mut b = Block {
                x: x.clone(),
                ..Block::default()
            };
            b.n1 = norm(&x, w("input_layernorm"), self.eps());
            b.q = linear(&b.n1, w("self_attn.q_proj"), d);
            b.k = linear(&b.n1, w("self_attn.k_proj"), d);
            b.v = linear(&b.n1, w("self_attn.v_proj"), d);
            if self.qwen3() {
                (b.q_raw, b.k_raw) = (b.q.clone(), b.k.clone());
                b.q = norm(&b.q_raw, w("self_attn.q_norm"), self.eps());
                b.k = norm(&b.k_raw, w("self_attn.k_norm"), self.eps());
            }
            rope(None, &self.rope, &mut b.q, h, &positions);
            rope(None, &self.rope, &mut b.k, g, &positions);
            let mut kv = Vec::new();
            for (i, &(row, len, pos)) in spans.iter().enumerate() {
                let (mut keys, mut values) = match &mut how {
                    How::Serve(pasts) => pasts[i].kv[layer].clone(),
                    How::Train(_) => self.past().kv[layer].clone(),
                };
                shape
                    .keys()
                    .write(&mut keys, pos, &b.k[row * kd..(row + len) * kd]);
                values[pos * kd..(pos + len) * kd]
                    .copy_from_slice(&b.v[row * kd..(row + len) * kd]);
                if let How::Serve(pasts) = &mut how {
                    pasts[i].kv[layer] = (keys.clone(), values.clone());
                }
                kv.push((keys, values));
            }
            let to_read: Vec<Span> = spans
                .iter()
                .zip(&kv)
                .map(|(&(row, len, pos), (k, v))| Span {
                    row,
                    len,
                    pos,
                    k,
                    v,
                })
                .collect();
            b.mixed = vec![0.0; t * qd];
            attention(None, shape, &b.q, &to_read, &mut b.mixed);
            add_in_place(&mut x, &linear(&b.mixed, w("self_attn.o_proj"), qd));
            b.x2 = x.clone();
            b.n2 = norm(&x, w("post_attention_layernorm"), self.eps());
            b.gate = linear(&b.n2, w("mlp.gate_proj"), d);
            b.up = linear(&b.n2, w("mlp.up_proj"), d);
            b.act = vec![0.0; t * f];
            swiglu(None, &b.gate, &b.up, f, &mut b.act);
            b.mlp_out = vec![0.0; t * d];
            if self.learns(layer) {
                let ttt_layer = self.ttt_layer(layer);
                let u = &self.source(&b, &x0).to_vec()[..];
                match &mut how {
                    How::Serve(pasts) => {
                        let mut batch: Vec<(&mut FastWeight, usize)> = pasts
                            .iter_mut()
                            .zip(&spans)
                            .map(|(past, span)| (past.fast.get_mut(&layer).unwrap(), span.1))
                            .collect();
                        let io = (&b.act[..], u, &mut b.mlp_out[..]);
                        let made = ttt::forward_rows(None, &self.ttt, ttt_layer, &mut batch, io);
                        updates.extend(made.into_iter().map(|(_, update)| update));
                    }
                    How::Train(_) => {
                        for &(row, len, _) in &spans {
                            let (z, u) = (
                                &b.act[row * f..(row + len) * f],
                                &u[row * d..(row + len) * d],
                            );
                            let y = &mut b.mlp_out[row * d..(row + len) * d];
                            let start = w("mlp.down_proj");
                            ttt::forward(None, &self.ttt, ttt_layer, start, (z, u), y);
                        }
                    }
                }
            } else {
                ttt::down(None, &b.act, w("mlp.down_proj"), (d, f), &mut b.mlp_out);
            }
            add_in_place(&mut x, &b.mlp_out);
            if let How::Train(tape) = &mut how {
                tape.push(b);
            }
        }
        if let How::Serve(pasts) = how {
            for (past, span) in pasts.iter_mut().zip(&spans) {
                past.pos += span.1;
            }
        }
        let normed = norm(&x, &self.weights["model.norm.weight"], self.eps());
        (linear(&normed, &self.weights[self.head()], d), x, updates)
    }

    fn source<'a>(&self, block: &'a Block, x0: &'a [f32]) -> &'a [f32] {
        match self.ttt.target {
            TttTarget::HiddenStates => &block.n2,
            TttTarget::InputEmbed => x0,
        }
    }

    /// Mean next-token cross-entropy of one sequence and its gradient by all weights.
    pub fn loss_and_grads(&self, ids: &[u32]) -> (f64, Tensors) {
        let mut tape = Vec::new();
        let (logits, hidden, _) = self.forward(&[ids], How::Train(&mut tape));
        let (d, f, t) = (
            self.number("hidden_size"),
            self.number("intermediate_size"),
            ids.len(),
        );
        let vocab = self.number("vocab_size");
        let mut grads: Tensors = self
            .weights
            .iter()
            .map(|(name, w)| (name.clone(), vec![0.0; w.len()]))
            .collect();
        let mut dlogits = vec![0f32; t * vocab];
        let mut loss = 0.0;
        for i in 0..t - 1 {
            let row = &logits[i * vocab..(i + 1) * vocab];
            let label = ids[i + 1] as usize;
            let top = row.iter().fold(f32::MIN, |m, x| m.max(*x)) as f64;
            let sum: f64 = row.iter().map(|x| (*x as f64 - top).exp()).sum();
            loss += (sum.ln() + top - row[label] as f64) / (t - 1) as f64;
            for (j, to) in dlogits[i * vocab..(i + 1) * vocab].iter_mut().enumerate() {
                let p = (row[j] as f64 - top).exp() / sum - f64::from(u8::from(j == label));
                *to = (p / (t - 1) as f64) as f32;
            }
        }
        let embed = "model.embed_tokens.weight";
        let norm_w = &self.weights["model.norm.weight"];
        let normed = norm(&hidden, norm_w, self.eps());
        let dnormed = {
            let to = grads.get_mut(self.head()).unwrap();
            linear_backward(&normed, &self.weights[self.head()], &dlogits, d, to)
        };
        let mut dx = vec![0.0; t * d];
        let to = grads.get_mut("model.norm.weight").unwrap();
        rms_norm_backward(
            None,
            &hidden,
            norm_w,
            self.eps(),
            &dnormed,
            &mut dx,
            Some(to),
        );
        let mut dx0 = vec![0.0; t * d];
        for (layer, b) in tape.iter().enumerate().rev() {
            self.block_backward(
                layer,
                b,
                &tape[0].x,
                (&mut dx, &mut dx0),
                (f, &[(0, t)]),
                &mut grads,
            );
        }
        add_in_place(&mut dx0, &dx);
        let to = grads.get_mut(embed).unwrap();
        for (&id, dx) in ids.iter().zip(dx0.chunks_exact(d)) {
            add_in_place(&mut to[id as usize * d..][..d], dx);
        }
        (loss, grads)
    }

    fn block_backward(
        &self,
        layer: usize,
        b: &Block,
        x0: &[f32],
        (dx, dx0): (&mut Vec<f32>, &mut [f32]),
        (f, spans): (usize, &[(usize, usize)]),
        grads: &mut Tensors,
    ) {
        let d = self.number("hidden_size");
        let t = dx.len() / d;
        let shape = self.shape();
        let (h, g, e) = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        );
        let qd = h * e;
        let key = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let mut linear_back = |name: &str, x: &[f32], dy: &[f32], width: usize| {
            let to = grads.get_mut(&key(name)).unwrap();
            linear_backward(x, &self.weights[&key(name)], dy, width, to)
        };
        let mut dn = vec![0.0; t * d];
        let dact = if self.learns(layer) {
            let u = self.source(b, x0).to_vec();
            let mut dact = vec![0.0; t * f];
            let mut take = |name: &str| grads.remove(&key(name));
            let (mut dw, mut dconv) = (take("mlp.down_proj"), take("mlp.ttt_conv"));
            let mut dproj = take("mlp.ttt_proj");
            let du = match self.ttt.target {
                TttTarget::HiddenStates => &mut dn[..],
                TttTarget::InputEmbed => dx0,
            };
            let grad = TttGrad {
                dz: &mut dact,
                du: Some(du),
                dw: dw.as_deref_mut(),
                dconv: dconv.as_deref_mut(),
                dproj: dproj.as_deref_mut(),
            };
            let (w, io) = (
                self.w(layer, "mlp.down_proj"),
                (&b.act[..], &u[..], &dx[..]),
            );
            ttt::backward(None, &self.ttt, self.ttt_layer(layer), w, io, grad);
            for (name, sum) in [("down_proj", dw), ("ttt_conv", dconv), ("ttt_proj", dproj)] {
                grads.extend(sum.map(|sum| (key(&format!("mlp.{name}")), sum)));
            }
            dact
        } else {
            linear_back("mlp.down_proj", &b.act, dx, f)
        };
        let mut linear_back = |name: &str, x: &[f32], dy: &[f32], width: usize| {
            let to = grads.get_mut(&key(name)).unwrap();
            linear_backward(x, &self.weights[&key(name)], dy, width, to)
        };
        let (mut dgate, mut dup) = (vec![0.0; t * f], vec![0.0; t * f]);
        swiglu_backward(None, (&b.gate, &b.up, &dact), f, &mut dgate, &mut dup);
        add_in_place(&mut dn, &linear_back("mlp.gate_proj", &b.n2, &dgate, d));
        add_in_place(&mut dn, &linear_back("mlp.up_proj", &b.n2, &dup, d));
        let w = |name: &str| self.w(layer, name);
        rms_norm_backward(
            None,
            &b.x2,
            w("post_attention_layernorm"),
            self.eps(),
            &dn,
            dx,
            None,
        );
        let dmixed = linear_back("self_attn.o_proj", &b.mixed, dx, qd);
        let (mut dq, mut dk) = (vec![0.0; b.q.len()], vec![0.0; b.k.len()]);
        let mut dv = vec![0.0; b.v.len()];
        let grad = AttentionGrad {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        let rows: Vec<SpanRows> = spans
            .iter()
            .map(|&(row, len)| SpanRows {
                row,
                len,
                ..SpanRows::default()
            })
            .collect();
        attention_backward(None, shape, (&b.q, &b.k, &b.v, &dmixed), &rows, grad);
        let positions: Vec<u32> = (0..t as u32).collect();
        rope_backward(None, &self.rope, &mut dq, h, &positions);
        rope_backward(None, &self.rope, &mut dk, g, &positions);
        if self.qwen3() {
            for (dx, raw, name) in [
                (&mut dq, &b.q_raw, "self_attn.q_norm"),
                (&mut dk, &b.k_raw, "self_attn.k_norm"),
            ] {
                let mut before = vec![0.0; dx.len()];
                rms_norm_backward(None, raw, w(name), self.eps(), dx, &mut before, None);
                *dx = before;
            }
        }
        let mut dn = linear_back("self_attn.q_proj", &b.n1, &dq, d);
        add_in_place(&mut dn, &linear_back("self_attn.k_proj", &b.n1, &dk, d));
        add_in_place(&mut dn, &linear_back("self_attn.v_proj", &b.n1, &dv, d));
        rms_norm_backward(None, &b.x, w("input_layernorm"), self.eps(), &dn, dx, None);
    }
}

fn norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    rms_norm(None, x, w, eps, &mut out);
    out
}

/// `x wᵀ`
fn linear(x: &[f32], w: &[f32], width: usize) -> Vec<f32> {
    let (t, out) = (x.len() / width, w.len() / width);
    let mut y = vec![0.0; t * out];
    ttt::down(None, x, w, (out, width), &mut y);
    y
}

/// `dy w`, and `dw += dyᵀ x`.
fn linear_backward(x: &[f32], w: &[f32], dy: &[f32], width: usize, dw: &mut [f32]) -> Vec<f32> {
    let (t, out) = (x.len() / width, w.len() / width);
    let mut dx = vec![0.0; x.len()];
    let (dy, to) = (Mat::new(dy, t, out), MatMut::new(&mut dx, t, width));
    matmul(None, dy, Mat::new(w, out, width), 1.0, false, to);
    let to = MatMut::new(dw, out, width);
    matmul(None, dy.t(), Mat::new(x, t, width), 1.0, true, to);
    dx
}
