//! A decoder's weights on the card: matrices in the model's format, norms and what learns in `f32`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::attention::busy;
use crate::card::{launch, Buffer, Format, Lane, Mat};
use crate::driver::{Address, Fault, Result};
use crate::small::Small;
use crate::table::{self, Shape, Tensor};

/// Rows up to which a product reads the weights row by row; cuBLAS is made for more.
pub const FEW_ROWS: usize = 4;
/// Shared memory that every kernel has on every card.
const SHARED_BYTES: usize = 48 << 10;

/// A decoder's dimensions, by the shape letters of core/src/model.
#[derive(Clone, Copy)]
pub struct Dims {
    pub v: usize,
    pub d: usize,
    pub f: usize,
    pub layers: usize,
    pub h: usize,
    pub g: usize,
    pub e: usize,
    pub eps: f32,
    pub head_norms: bool,
    pub tied: bool,
    pub format: Format,
    pub positions: usize,
    pub chunk: usize,
    pub taps: usize,
    pub embedded_targets: bool,
    pub max_drift: f32,
    pub decay: f32,
    pub delta: f32,
}

impl Dims {
    pub fn new(shape: &Shape) -> Result<Self> {
        let dims = Self {
            v: shape.vocab_size as usize,
            d: shape.hidden_size as usize,
            f: shape.intermediate_size as usize,
            layers: shape.num_hidden_layers as usize,
            h: shape.num_attention_heads as usize,
            g: shape.num_key_value_heads as usize,
            e: shape.head_dim as usize,
            eps: shape.rms_norm_eps,
            head_norms: shape.head_norms != 0,
            tied: shape.tied != 0,
            format: match shape.exact {
                0 => Format::Bf16,
                _ => Format::F32,
            },
            positions: shape.positions as usize,
            chunk: shape.chunk_len as usize,
            taps: shape.kernel_size as usize,
            embedded_targets: shape.embedded_targets != 0,
            max_drift: shape.max_drift,
            decay: shape.decay,
            delta: shape.delta,
        };
        let whole = dims.e.is_multiple_of(2) && dims.g > 0 && dims.h.is_multiple_of(dims.g);
        if !whole || dims.e > 256 || dims.d == 0 || dims.v == 0 || dims.f == 0 {
            return Err(Fault::refused(format!(
                "heads of {} numbers, {} on {}, are not for this device's kernels",
                dims.e, dims.h, dims.g
            )));
        }
        Ok(dims)
    }

    /// `β/(η c)`, of the delta rule if that is the rule and there is a step.
    pub fn delta_rate(&self, lr: f32) -> Option<f32> {
        let rate = self.delta / (lr * self.chunk as f32);
        (self.delta != 0.0 && lr != 0.0).then_some(rate)
    }

    pub fn qd(&self) -> usize {
        self.h * self.e
    }

    pub fn kd(&self) -> usize {
        self.g * self.e
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv(&self) -> usize {
        self.qd() + 2 * self.kd()
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        1.0 / (self.e as f32).sqrt()
    }

    /// Shape (out, in) of a matrix, (1, n) of what is none.
    fn shape(&self, which: u32) -> (usize, usize) {
        match which {
            table::EMBED | table::HEAD => (self.v, self.d),
            table::Q => (self.qd(), self.d),
            table::K | table::V => (self.kd(), self.d),
            table::O => (self.d, self.qd()),
            table::GATE | table::UP => (self.f, self.d),
            table::DOWN => (self.d, self.f),
            table::Q_NORM | table::K_NORM => (1, self.e),
            table::TTT_CONV => (self.d, self.taps),
            table::TTT_PROJ => (self.d, self.d),
            _ => (1, self.d),
        }
    }
}

pub struct Layer {
    pub input_norm: Buffer,
    pub post_norm: Buffer,
    pub q_norm: Option<Buffer>,
    pub k_norm: Option<Buffer>,
    /// (qd + 2 kd, d), (d, qd), (2f, d), (d, f)
    pub qkv: Buffer,
    pub o: Buffer,
    pub gate_up: Buffer,
    pub down: Buffer,
}

/// What a layer that learns begins with, in `f32`.
pub struct Start {
    /// (d, f)
    pub w: Buffer,
    pub norm: f64,
    pub taps: Buffer,
    pub proj: Option<Buffer>,
    /// Whether its updates are anything but zero.
    pub writes: bool,
}

pub struct Model {
    pub lane: Arc<Lane>,
    pub dims: Dims,
    pub embed: Buffer,
    pub head: Option<Buffer>,
    pub final_norm: Buffer,
    pub cos: Buffer,
    pub sin: Buffer,
    pub layers: Vec<Layer>,
    pub starts: BTreeMap<u32, Start>,
    /// How many blocks of a split row have ended, for each; zero between kernels.
    pub arrived: Buffer,
    pub small: Mutex<Small>,
}

impl Model {
    /// Copies a model to the card.
    ///
    /// # Errors
    /// Out of memory; a tensor that is missing or has another size.
    ///
    /// # Safety
    /// The pointers in `shape` and `tensors` can be read for the lengths given.
    pub unsafe fn load(lane: &Arc<Lane>, shape: &Shape, tensors: &[Tensor]) -> Result<Self> {
        let dims = Dims::new(shape)?;
        let find = |layer: u32, which: u32| -> Result<&[f32]> {
            let found = tensors
                .iter()
                .find(|t| t.which == which && (t.layer == layer || which <= table::HEAD));
            let found = found.ok_or_else(|| {
                Fault::refused(format!("parameter {which} of layer {layer} is missing"))
            })?;
            let (rows, columns) = dims.shape(which);
            if found.len != (rows * columns) as u64 {
                return Err(Fault::refused(format!(
                    "parameter {which} of layer {layer} has {} numbers, not {}",
                    found.len,
                    rows * columns
                )));
            }
            // SAFETY: the caller's promise.
            Ok(unsafe { std::slice::from_raw_parts(found.data, found.len as usize) })
        };
        let matrices = |layer: u32, all: &[u32]| -> Result<Buffer> {
            let bytes: usize = all
                .iter()
                .map(|which| dims.shape(*which))
                .map(|(r, c)| r * c)
                .sum();
            let buffer = lane.buffer(bytes * dims.format.bytes())?;
            let mut at = buffer.at;
            for which in all {
                let data = find(layer, *which)?;
                convert(lane, data, at, dims.format)?;
                at += (data.len() * dims.format.bytes()) as Address;
            }
            Ok(buffer)
        };
        let plain = |layer: u32, which: u32| lane.upload(find(layer, which)?);
        let mut layers = Vec::with_capacity(dims.layers);
        for layer in 0..dims.layers as u32 {
            let norm = |which| match dims.head_norms {
                true => plain(layer, which).map(Some),
                false => Ok(None),
            };
            layers.push(Layer {
                input_norm: plain(layer, table::INPUT_NORM)?,
                post_norm: plain(layer, table::POST_NORM)?,
                q_norm: norm(table::Q_NORM)?,
                k_norm: norm(table::K_NORM)?,
                qkv: matrices(layer, &[table::Q, table::K, table::V])?,
                o: matrices(layer, &[table::O])?,
                gate_up: matrices(layer, &[table::GATE, table::UP])?,
                down: matrices(layer, &[table::DOWN])?,
            });
        }
        let mut starts = BTreeMap::new();
        for tensor in tensors.iter().filter(|t| t.which == table::TTT_CONV) {
            let layer = tensor.layer;
            let (down, taps) = (find(layer, table::DOWN)?, find(layer, table::TTT_CONV)?);
            let has_proj = tensors
                .iter()
                .any(|t| t.which == table::TTT_PROJ && t.layer == layer);
            let proj = match has_proj {
                true => Some(find(layer, table::TTT_PROJ)?),
                false => None,
            };
            let zero = |x: &[f32]| x.iter().all(|x| *x == 0.0);
            starts.insert(
                layer,
                Start {
                    w: lane.upload(down)?,
                    norm: down
                        .iter()
                        .map(|x| f64::from(*x).powi(2))
                        .sum::<f64>()
                        .sqrt(),
                    taps: lane.upload(taps)?,
                    writes: !zero(taps) && !proj.is_some_and(zero),
                    proj: proj.map(|p| lane.upload(p)).transpose()?,
                },
            );
        }
        let angles = dims.positions * dims.e / 2;
        // SAFETY: the caller's promise.
        let (cos, sin) = unsafe {
            (
                std::slice::from_raw_parts(shape.cos, angles),
                std::slice::from_raw_parts(shape.sin, angles),
            )
        };
        let model = Self {
            dims,
            embed: matrices(0, &[table::EMBED])?,
            head: match dims.tied {
                true => None,
                false => Some(matrices(0, &[table::HEAD])?),
            },
            final_norm: plain(0, table::FINAL_NORM)?,
            cos: lane.upload(cos)?,
            sin: lane.upload(sin)?,
            layers,
            starts,
            arrived: lane.upload(&vec![0i32; busy(lane)])?,
            small: Mutex::default(),
            lane: lane.clone(),
        };
        lane.wait()?;
        Ok(model)
    }

    pub fn head(&self) -> &Buffer {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Where a parameter lies that products read, and in which format. Of a layer that learns this is the plain matrix: `starts` has
    /// a copy of its own for serving.
    pub fn place(&self, layer: u32, which: u32) -> Option<(Address, Format)> {
        let dims = &self.dims;
        let size = dims.format.bytes() as Address;
        let (d, f) = (dims.d as Address, dims.f as Address);
        let (qd, kd) = (dims.qd() as Address, dims.kd() as Address);
        let block = || self.layers.get(layer as usize);
        let matrix = |at| Some((at, dims.format));
        let plain = |buffer: &Buffer| Some((buffer.at, Format::F32));
        match which {
            table::EMBED => matrix(self.embed.at),
            table::HEAD => matrix(self.head.as_ref()?.at),
            table::FINAL_NORM => plain(&self.final_norm),
            table::INPUT_NORM => plain(&block()?.input_norm),
            table::POST_NORM => plain(&block()?.post_norm),
            table::Q_NORM => plain(block()?.q_norm.as_ref()?),
            table::K_NORM => plain(block()?.k_norm.as_ref()?),
            table::Q => matrix(block()?.qkv.at),
            table::K => matrix(block()?.qkv.at + qd * d * size),
            table::V => matrix(block()?.qkv.at + (qd + kd) * d * size),
            table::O => matrix(block()?.o.at),
            table::GATE => matrix(block()?.gate_up.at),
            table::UP => matrix(block()?.gate_up.at + f * d * size),
            table::DOWN => matrix(block()?.down.at),
            table::TTT_CONV => plain(&self.starts.get(&layer)?.taps),
            table::TTT_PROJ => plain(self.starts.get(&layer)?.proj.as_ref()?),
            _ => None,
        }
    }

    /// `y (t, out) = x (t, width) wᵀ` in the model's format.
    pub fn linear(
        &self,
        x: Address,
        w: Address,
        y: Address,
        t: usize,
        (width, out): (usize, usize),
    ) -> Result<()> {
        if t <= FEW_ROWS {
            return self.few_rows((x, w), (y, 0, false), t, (width, out));
        }
        let mat = |at, stride| Mat::new(at, stride, self.dims.format);
        self.lane.product(
            mat(y, out),
            mat(x, width),
            mat(w, width).t(),
            (t, out, width),
            1.0,
            0.0,
        )
    }

    /// `y (t, out) = x wᵀ` in `f32`, added to what is there with `add`.
    pub fn linear_f32(
        &self,
        x: Address,
        w: Address,
        y: Address,
        add: bool,
        t: usize,
        (width, out): (usize, usize),
    ) -> Result<()> {
        if t <= FEW_ROWS {
            return self.few_rows((x, w), (0, y, add), t, (width, out));
        }
        let mat = |at, stride| Mat::new(at, stride, self.dims.format);
        let c = Mat::new(y, out, Format::F32);
        let beta = if add { 1.0 } else { 0.0 };
        self.lane.product(
            c,
            mat(x, width),
            mat(w, width).t(),
            (t, out, width),
            1.0,
            beta,
        )
    }

    fn few_rows(
        &self,
        (x, w): (Address, Address),
        (y, sums, add): (Address, Address, bool),
        t: usize,
        (width, out): (usize, usize),
    ) -> Result<()> {
        let name = if t == 1 { "one_row" } else { "four_rows" };
        let kernel = self.lane.kernel(name, Some(self.dims.format));
        launch!(self.lane, kernel, (out.div_ceil(4), 1, 1), 128, 0;
            x, w, y, sums, i32::from(add), t as i32, width as i32, out as i32)
    }

    /// Bytes of t normed rows in shared memory, where a kernel makes them for itself.
    fn normed_bytes(&self, t: usize) -> Option<usize> {
        let bytes = t * self.dims.d * self.dims.format.bytes();
        // As much again is left for what kernels have of their own.
        (t <= FEW_ROWS && bytes <= SHARED_BYTES / 2).then_some(bytes)
    }

    /// y (t, out) = the norm of x, times wᵀ; `normed` (t, d) is a place for it.
    pub fn normed_linear(
        &self,
        (x, norm): (Address, &Buffer),
        w: Address,
        (normed, y): (Address, Address),
        t: usize,
        out: usize,
    ) -> Result<()> {
        let m = &self.dims;
        let Some(bytes) = self.normed_bytes(t) else {
            self.norm(x, norm, 0, normed, 0, t)?;
            return self.linear(normed, w, y, t, (m.d, out));
        };
        let name = if t == 1 { "normed_one" } else { "normed_four" };
        launch!(self.lane, self.lane.kernel(name, Some(m.format)), (out.div_ceil(4), 1, 1), 128, bytes;
            x, norm.at, w, y, t as i32, m.d as i32, out as i32, m.eps)
    }

    /// act (t, f) = silu(gate) · up of [gate | up] = the norm of x, times wᵀ; `normed` (t, d) and `gate_up` (t, 2f) are places for them.
    /// `u` and `z`, unless 0, get norm and act in `f32`.
    pub fn gated(
        &self,
        (x, norm): (Address, &Buffer),
        w: Address,
        (normed, gate_up, act): (Address, Address, Address),
        (u, z): (Address, Address),
        t: usize,
    ) -> Result<()> {
        let m = &self.dims;
        let Some(bytes) = self.normed_bytes(t) else {
            self.norm(x, norm, 0, normed, u, t)?;
            self.linear(normed, w, gate_up, t, (m.d, 2 * m.f))?;
            return self.swiglu(gate_up, act, z, t);
        };
        let name = if t == 1 { "gated_one" } else { "gated_four" };
        launch!(self.lane, self.lane.kernel(name, Some(m.format)), (m.f.div_ceil(4), 1, 1), 128, bytes;
            x, norm.at, w, act, u, z, t as i32, m.d as i32, m.f as i32, m.eps)
    }

    /// x (t, d) = the embeddings of `ids`.
    pub fn embed_rows(&self, ids: Address, x: Address, t: usize) -> Result<()> {
        let kernel = self.lane.kernel("embed", Some(self.dims.format));
        launch!(self.lane, kernel, (t, 1, 1), 256, 0; self.embed.at, ids, x, self.dims.d as i32)
    }

    /// out (n, d) = the norm of rows of x, of all where `rows` is 0; `plain`, unless 0, gets it in `f32`.
    pub fn norm(
        &self,
        x: Address,
        w: &Buffer,
        rows: Address,
        out: Address,
        plain: Address,
        n: usize,
    ) -> Result<()> {
        let kernel = self.lane.kernel("rms_norm", Some(self.dims.format));
        launch!(self.lane, kernel, (n, 1, 1), 256, 0; x, w.at, rows, out, plain, self.dims.d as i32, self.dims.eps)
    }

    /// act (t, f) of [gate | up] (t, 2f); `plain`, unless 0, gets it in `f32`.
    pub fn swiglu(&self, gate_up: Address, act: Address, plain: Address, t: usize) -> Result<()> {
        let kernel = self.lane.kernel("swiglu", Some(self.dims.format));
        launch!(self.lane, kernel, (t, 1, 1), 256, 0; gate_up, act, plain, self.dims.f as i32)
    }
}

/// Copies numbers to `at` in another format, by way of the card.
pub fn convert(lane: &Arc<Lane>, data: &[f32], at: Address, format: Format) -> Result<()> {
    if format == Format::F32 {
        return lane.put(at, data);
    }
    let staged = lane.upload(data)?;
    let kernel = lane.kernel("convert", Some(format));
    launch!(lane, kernel, (data.len().div_ceil(256), 1, 1), 256, 0; staged.at, at, data.len() as u64)
}
