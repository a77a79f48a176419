//! How a model in service keeps its matrices, and how it multiplies by them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::forward::product;
use super::{LayerParam, Model, ModelError, ParamId, LINEARS};
use crate::kernels::{matmul_bf16, Mat, MatMut, PackedBf16, PackedQ4, PackedQ8, Pool};
use crate::ttt::{FastFormat, TttConfig, TttMode};

/// Numbers in which a model in service keeps its matrices. Norms are always `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    F32,
    /// What a student's file holds, so nothing is lost.
    #[default]
    Bf16,
    /// 8 bits and a scale for each 32 numbers.
    Q8,
    /// 4 bits, a scale and a minimum for each 32 numbers; the head, which is the embedding too where they are tied, in 8 bits.
    Q4,
}

impl WeightFormat {
    /// All of them, most exact first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Q8, Self::Q4];

    /// The name used in options: `f32`, `bf16`, `q8`, `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }
}

/// In which numbers products of many rows are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    #[default]
    F32,
    /// Operands rounded to bf16, sums in `f32`, where the processor is faster at that; weights stay `f32`.
    Bf16,
}

/// A matrix (out, in) packed for serving.
#[derive(PartialEq)]
pub(super) enum Packed {
    Bf16(PackedBf16),
    Q8(PackedQ8),
    Q4(PackedQ4),
}

impl Packed {
    fn new(format: WeightFormat, w: &[f32], rows: usize, cols: usize) -> Option<Self> {
        Some(match format {
            WeightFormat::F32 => return None,
            WeightFormat::Bf16 => Self::Bf16(PackedBf16::new(w, rows, cols)),
            WeightFormat::Q8 => Self::Q8(PackedQ8::new(w, rows, cols)),
            WeightFormat::Q4 => Self::Q4(PackedQ4::new(w, rows, cols)),
        })
    }

    fn product(&self, pool: Option<&Pool>, x: &[f32], t: usize, y: &mut [f32]) {
        match self {
            Self::Bf16(w) => w.product(pool, x, t, y),
            Self::Q8(w) => w.product(pool, x, t, y),
            Self::Q4(w) => w.product(pool, x, t, y),
        }
    }

    pub fn row(&self, i: usize, out: &mut [f32]) {
        match self {
            Self::Bf16(w) => w.row(i, out),
            Self::Q8(w) => w.row(i, out),
            Self::Q4(w) => w.row(i, out),
        }
    }

    fn unpack(&self) -> Vec<f32> {
        match self {
            Self::Bf16(w) => w.unpack(),
            Self::Q8(w) => w.unpack(),
            Self::Q4(w) => w.unpack(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Bf16(w) => w.bytes(),
            Self::Q8(w) => w.bytes(),
            Self::Q4(w) => w.bytes(),
        }
    }
}

/// Matrices that gradients through a packed model need in `f32`, made at the first use and then kept.
pub(super) type Unpacked = Mutex<BTreeMap<ParamId, Arc<Vec<f32>>>>;

impl Model {
    /// The model for serving: its matrices in `format`, in the order in which products read them, and no longer in `f32`. It runs
    /// forward only; it can be neither trained nor saved.
    pub fn packed(self, format: WeightFormat) -> Self {
        self.packed_by(format, &|_| format)
    }

    /// [`Self::packed`] for a model that was trained from `base`, which is packed in the same format: what is the base's own is taken
    /// from there. In 4 bits what training changed is kept in 8, for the change is smaller than a step of 4 bits, and rounding would
    /// take it back: a student that lies beside its base on a grid of 4 bits *is* its base.
    pub fn packed_beside(self, format: WeightFormat, base: &Model) -> Self {
        let (mut kept, mut changed) = (Vec::new(), BTreeSet::new());
        // A student's file holds the base's numbers in bf16.
        let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
        let same = |(own, base): (&f32, f32)| *own == base || *own == rounded(base);
        for (id, packed) in base.packed.iter().filter(|_| format == WeightFormat::Q4) {
            match (&**packed, self.weights.params.get(id)) {
                (Packed::Q4(w), Some(own)) if own.iter().zip(w.unpack()).all(same) => {
                    kept.push((*id, packed.clone()));
                }
                (Packed::Q4(_), Some(_)) => _ = changed.insert(*id),
                _ => {}
            }
        }
        let of = |id| match changed.contains(&id) {
            true => WeightFormat::Q8,
            false => format,
        };
        let mut model = self.packed_by(format, &of);
        Arc::make_mut(&mut model.packed).extend(kept);
        model.sharing(base)
    }

    /// Each matrix in the format that `of` says; those beside the matrices as `format` has it.
    fn packed_by(mut self, format: WeightFormat, of: &dyn Fn(ParamId) -> WeightFormat) -> Self {
        let mut ids: Vec<ParamId> = (0..self.config.num_hidden_layers as u16)
            .flat_map(|layer| LINEARS.map(|p| ParamId::Layer(layer, p)))
            .collect();
        ids.push(ParamId::Embed);
        ids.push(self.head_id());
        let mut packed = (*self.packed).clone();
        for id in ids {
            // The head comes last and may be the embedding, which is done by then.
            let Some(w) = self.weights.params.get(&id) else {
                continue;
            };
            let format = match (of(id), id) {
                (WeightFormat::Q4, ParamId::Embed | ParamId::Head) => WeightFormat::Q8,
                (format, _) => format,
            };
            let shape = id.shape(&self.config);
            // A down-projection that learns begins with the trained numbers, not with their rounding.
            let learns = |ttt: &TttConfig| {
                let layers = ttt.layers.iter();
                layers
                    .clone()
                    .any(|layer| id == ParamId::Layer(*layer, LayerParam::Down))
            };
            if let Some(new) = Packed::new(format, w, shape[0], shape[1]) {
                packed.insert(id, Arc::new(new));
                if !self.config.ttt.as_ref().is_some_and(learns) {
                    self.weights.params.remove(&id);
                }
            }
        }
        if matches!(format, WeightFormat::Q8 | WeightFormat::Q4) {
            for id in self.ttt_projections() {
                let p = &self.weights.params[&id];
                let d = self.config.hidden_size;
                let new = PackedQ8::new(&transposed(p, d), d, d);
                packed.insert(id, Arc::new(Packed::Q8(new)));
            }
        }
        self.packed = Arc::new(packed);
        self.unpacked = Arc::default();
        self.with_starts()
    }

    /// The model with what its layers that learn begin with, so that no sequence has to measure it. Its weights must not change any more.
    fn with_starts(mut self) -> Self {
        let layers = self.in_place().flat_map(|ttt| &ttt.layers);
        let starts = layers.map(|layer| (*layer, self.start_weight(*layer)));
        self.starts = Arc::new(starts.collect());
        self
    }

    fn in_place(&self) -> impl Iterator<Item = &TttConfig> {
        let ttt = self.config.ttt.iter();
        ttt.filter(|ttt| ttt.mode == TttMode::InPlace)
    }

    /// Projections of layers that learn while they are read. They are kept as they were trained beside their packed transposes.
    fn ttt_projections(&self) -> Vec<ParamId> {
        let layers = self.in_place().flat_map(|ttt| &ttt.layers);
        let ids = layers.map(|layer| ParamId::Layer(*layer, LayerParam::TttProj));
        ids.filter(|id| self.weights.params.contains_key(id))
            .collect()
    }

    /// The packed transpose of a layer's projection, for a student of 8 or 4 bits.
    pub(super) fn packed_projection(&self, layer: usize) -> Option<&PackedQ8> {
        let id = ParamId::Layer(layer as u16, LayerParam::TttProj);
        match self.packed.get(&id).map(|packed| &**packed) {
            Some(Packed::Q8(packed)) => Some(packed),
            _ => None,
        }
    }

    /// In which numbers a layer of this model keeps a weight that has learned.
    pub(super) fn fast_format(&self, layer: u16) -> FastFormat {
        let id = ParamId::Layer(layer, LayerParam::Down);
        match self.packed.get(&id).map(|packed| &**packed) {
            // What was learned is small beside the weight, and 4 bits would round most of it away.
            Some(Packed::Q8(_) | Packed::Q4(_)) => FastFormat::Q8,
            Some(Packed::Bf16(_)) | None => FastFormat::F32,
        }
    }

    /// A parameter in `f32`. What is there packed alone is unpacked at the first call and kept, 4 bytes a number beside the packed ones.
    pub(super) fn plain_param(&self, id: ParamId) -> Arc<Vec<f32>> {
        if let Some(w) = self.weights.params.get(&id) {
            return w.clone();
        }
        let mut unpacked = self.kept_unpacked();
        let made = || Arc::new(self.packed[&id].unpack());
        unpacked.entry(id).or_insert_with(made).clone()
    }

    /// The numbers of a parameter, taken out of its packed form where it has one and kept nowhere.
    pub(crate) fn numbers(&self, id: ParamId) -> Arc<Vec<f32>> {
        match self.weights.params.get(&id) {
            Some(w) => w.clone(),
            None => Arc::new(self.packed[&id].unpack()),
        }
    }

    /// Whether its matrices are in a format for serving.
    pub fn is_packed(&self) -> bool {
        !self.packed.is_empty()
    }

    fn kept_unpacked(&self) -> MutexGuard<'_, BTreeMap<ParamId, Arc<Vec<f32>>>> {
        self.unpacked.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The blocks from `first` on and the head with the numbers that are served, in `f32`, for gradients through them.
    pub(super) fn plain_from(&self, first: usize) -> Self {
        let mut plain = self.clone();
        plain.compute = Compute::F32;
        plain.packed = Arc::default();
        // Nothing learns on its own in there: the caller puts in the weights that the rows met.
        plain.config.ttt = None;
        let layers = first as u16..self.config.num_hidden_layers as u16;
        let matrices = layers.flat_map(|layer| LINEARS.map(|p| ParamId::Layer(layer, p)));
        for id in matrices.chain([self.head_id()]) {
            plain.weights.params.insert(id, self.plain_param(id));
        }
        plain
    }

    /// The model with the numbers its packed matrices stand for, in `f32`: what products by them are judged by.
    pub fn unpacked(&self) -> Self {
        let mut plain = self.clone();
        plain.packed = Arc::default();
        plain.starts = Arc::default();
        for (id, packed) in self.packed.iter() {
            let numbers = match id {
                ParamId::Layer(_, LayerParam::TttProj) => {
                    transposed(&packed.unpack(), self.config.hidden_size)
                }
                _ => packed.unpack(),
            };
            plain.weights.params.insert(*id, Arc::new(numbers));
        }
        plain
    }

    /// The same model, with every tensor that equals the other's taken from there, so that it is in memory and in caches once.
    pub fn sharing(mut self, other: &Model) -> Self {
        for (id, param) in self.weights.params.iter_mut() {
            if let Some(same) = other.weights.params.get(id).filter(|o| ***o == **param) {
                *param = same.clone();
            }
        }
        for (id, own) in Arc::make_mut(&mut self.packed) {
            if let Some(same) = other.packed.get(id).filter(|o| ***o == **own) {
                *own = same.clone();
            }
        }
        match self.starts.is_empty() {
            true => self,
            false => self.with_starts(),
        }
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self) -> usize {
        let plain: usize = self.weights.params.values().map(|p| 4 * p.len()).sum();
        let unpacked: usize = self.kept_unpacked().values().map(|p| 4 * p.len()).sum();
        plain + unpacked + self.packed.values().map(|p| p.bytes()).sum::<usize>()
    }

    /// # Errors
    /// [`ModelError::Unsupported`] for a packed model.
    pub(super) fn check_plain(&self) -> Result<(), ModelError> {
        match self.packed.is_empty() {
            true => Ok(()),
            false => Err(ModelError::Unsupported(
                "its weights are packed for serving, and this needs them as they were trained"
                    .into(),
            )),
        }
    }

    /// `y = x wᵀ` for the matrix `id`: x (t, width), y (t, out).
    pub(super) fn multiply(
        &self,
        pool: Option<&Pool>,
        id: ParamId,
        x: &[f32],
        t: usize,
        y: &mut [f32],
    ) {
        if let Some(packed) = self.packed.get(&id) {
            return packed.product(pool, x, t, y);
        }
        let [out, width] = id.shape(&self.config)[..] else {
            unreachable!("a product by {}", id.name());
        };
        self.multiply_by(pool, x, self.param(id), t, (width, out), y)
    }

    /// The same for a matrix w (out, width) that is given.
    pub(super) fn multiply_by(
        &self,
        pool: Option<&Pool>,
        x: &[f32],
        w: &[f32],
        t: usize,
        (width, out): (usize, usize),
        y: &mut [f32],
    ) {
        match self.compute {
            Compute::F32 => product(pool, x, w, t, width, out, y),
            Compute::Bf16 => matmul_bf16(
                pool,
                Mat::new(x, t, width),
                Mat::new(w, out, width).t(),
                1.0,
                false,
                MatMut::new(y, t, out),
            ),
        }
    }

    /// [`Self::multiply`] of the same rows by several matrices, in one go where they are packed alike.
    pub(super) fn multiply_all<const N: usize>(
        &self,
        pool: Option<&Pool>,
        ids: [ParamId; N],
        x: &[f32],
        t: usize,
        mut ys: [&mut [f32]; N],
    ) {
        let packed = ids.map(|id| self.packed.get(&id).map(|p| &**p));
        if let Some(weights) = all(packed, |p| match p {
            Packed::Q8(w) => Some(w),
            _ => None,
        }) {
            return PackedQ8::products(&weights, pool, x, t, &mut ys);
        }
        if let Some(weights) = all(packed, |p| match p {
            Packed::Q4(w) => Some(w),
            _ => None,
        }) {
            return PackedQ4::products(&weights, pool, x, t, &mut ys);
        }
        if let Some(weights) = all(packed, |p| match p {
            Packed::Bf16(w) => Some(w),
            _ => None,
        }) {
            return PackedBf16::products(&weights, pool, x, t, &mut ys);
        }
        for (id, y) in ids.into_iter().zip(ys) {
            self.multiply(pool, id, x, t, y);
        }
    }

    /// `out = a b` or `out += a b` in the model's [`Compute`].
    pub(super) fn matmul(&self, pool: &Pool, a: Mat, b: Mat, accumulate: bool, out: MatMut) {
        match self.compute {
            Compute::F32 => crate::kernels::matmul(Some(pool), a, b, 1.0, accumulate, out),
            Compute::Bf16 => matmul_bf16(Some(pool), a, b, 1.0, accumulate, out),
        }
    }
}

/// The transpose of a square matrix (d, d).
fn transposed(m: &[f32], d: usize) -> Vec<f32> {
    let mut out = vec![0.0; d * d];
    for (i, row) in m.chunks_exact(d).enumerate() {
        for (j, x) in row.iter().enumerate() {
            out[j * d + i] = *x;
        }
    }
    out
}

/// The weights, if all are of the kind that `f` takes.
fn all<'a, T, const N: usize>(
    packed: [Option<&'a Packed>; N],
    f: impl Fn(&'a Packed) -> Option<&'a T>,
) -> Option<Vec<&'a T>> {
    packed.into_iter().map(|p| p.and_then(&f)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{write_tiny, FileDtype, Sequence};
    use super::*;
    use crate::kernels::features;

    fn tiny() -> (tempfile::TempDir, Model) {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 3).unwrap();
        let mut model = Model::load(dir.path()).unwrap();
        model.round_to_bf16();
        (dir, model)
    }

    /// Logits of every row of a prompt, then of three tokens one by one.
    fn logits(model: &Model) -> Vec<f32> {
        let pool = Pool::new(2, 0);
        let ids: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 50).collect();
        let mut sequence = Sequence::new(&model.config, 64);
        let mut all = Vec::new();
        let hidden = model.step(&pool, &mut [(&mut sequence, &ids)]).unwrap();
        all.extend(model.logits(&pool, &hidden, &(0..ids.len()).collect::<Vec<_>>()));
        for id in [5, 9, 13] {
            let hidden = model.step(&pool, &mut [(&mut sequence, &[id])]).unwrap();
            all.extend(model.logits(&pool, &hidden, &[0]));
        }
        all
    }

    #[test]
    fn packed_weights_change_the_logits_by_no_more_than_their_rounding() {
        let (_dir, model) = tiny();
        let want = logits(&model);
        let size = (want.iter().map(|x| x * x).sum::<f32>() / want.len() as f32).sqrt();
        let mut before = f32::INFINITY;
        for (format, limit) in [
            (WeightFormat::Q4, 0.25),
            (WeightFormat::Q8, 0.03),
            (WeightFormat::Bf16, 0.02),
            (WeightFormat::F32, 0.0),
        ] {
            let packed = model.clone().packed(format);
            let got = logits(&packed);
            let error = got
                .iter()
                .zip(&want)
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f32>();
            let error = (error / want.len() as f32).sqrt() / size;
            assert!(error <= limit, "{format:?}: {error}");
            assert!(
                error <= before,
                "{format:?} is worse than the format with fewer bits: {error}, {before}"
            );
            before = error;
            assert!(format == WeightFormat::F32 || packed.weight_bytes() < model.weight_bytes());
        }
    }

    #[test]
    fn serving_packed_weights_agrees_with_the_plain_forward_pass_on_what_they_stand_for() {
        let (_dir, model) = tiny();
        let ids: Vec<u32> = (0..70).map(|i| 3 + i * 7 % 50).collect();
        let pool = Pool::new(2, 0);
        // VDPBF16PS takes activations in bf16 as well: each is off by up to 2⁻⁹ of itself.
        let bf16 = match features().avx512_bf16_full_rate {
            true => 0.03,
            false => 1e-5,
        };
        for (format, limit) in [
            (WeightFormat::F32, 1e-5),
            (WeightFormat::Bf16, bf16),
            (WeightFormat::Q8, 0.1),
            (WeightFormat::Q4, 0.1),
        ] {
            let packed = model.clone().packed(format);
            let plain = packed.unpacked();
            let rows = crate::model::PackedRows::new(&[ids.len()]);
            let mut want = plain.embed(&ids).unwrap();
            plain.blocks(
                &pool,
                (0, plain.config.num_hidden_layers),
                &rows,
                None,
                &mut want,
                None,
            );
            // In tiles, then the last few together, then one alone.
            let mut sequence = Sequence::new(&packed.config, 8);
            let mut got = Vec::new();
            for part in [&ids[..60], &ids[60..69], &ids[69..]] {
                got.extend(packed.step(&pool, &mut [(&mut sequence, part)]).unwrap());
            }
            let size = (want.iter().map(|x| x * x).sum::<f32>() / want.len() as f32).sqrt();
            let off = got
                .iter()
                .zip(&want)
                .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(off <= limit * size, "{format:?}: {off} of {size}");
        }
    }

    #[test]
    fn a_packed_model_shares_what_is_equal_and_cannot_be_saved() {
        let (dir, model) = tiny();
        let base = model.clone().packed(WeightFormat::Bf16);
        let mut changed = model.clone();
        let id = ParamId::Layer(1, crate::model::LayerParam::Up);
        Arc::make_mut(changed.weights.params.get_mut(&id).unwrap())[0] += 1.0;
        let student = changed.packed(WeightFormat::Bf16).sharing(&base);
        for (key, own) in student.packed.iter() {
            assert_eq!(Arc::ptr_eq(own, &base.packed[key]), *key != id, "{key:?}");
        }
        let refused = base.save(dir.path(), FileDtype::Bf16).unwrap_err();
        assert!(
            refused.to_string().contains("packed for serving"),
            "{refused}"
        );
    }

    #[test]
    fn four_bits_do_not_take_back_what_a_student_was_trained() {
        let (_, model) = tiny();
        // A base that stands on a grid of 4 bits, as one from a file of 4 bits does.
        let base = model.packed(WeightFormat::Q4);
        let plain = base.unpacked();
        let mut student = plain.clone();
        student.round_to_bf16();
        let id = ParamId::Layer(1, crate::model::LayerParam::Up);
        let trained = Arc::make_mut(student.weights.params.get_mut(&id).unwrap());
        let mut random = crate::kernels::Random::new(3);
        trained
            .iter_mut()
            .for_each(|w| *w += 0.004 * random.normal() as f32);
        let trained = trained.clone();
        let rounded = student.clone().packed(WeightFormat::Q4);
        let served = student.packed_beside(WeightFormat::Q4, &base);
        // The head is in 8 bits, which do not hold what bf16 has rounded.
        let four = |w: &Packed| matches!(w, Packed::Q4(_));
        for (key, own) in base.packed.iter().filter(|(_, w)| four(w)) {
            assert_eq!(Arc::ptr_eq(own, &served.packed[key]), *key != id, "{key:?}");
        }
        assert!(!four(&served.packed[&id]));
        let apart = |a: &[f32], b: &[f32]| {
            let square = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
            square.sum::<f64>().sqrt()
        };
        let change = apart(&trained, &plain.weights.params[&id]);
        let lost = apart(&trained, &served.packed[&id].unpack());
        assert!(lost < 0.5 * change, "{lost} of {change}");
        // Rounded to 4 bits it would have been its base again.
        let lost = apart(&trained, &rounded.packed[&id].unpack());
        assert!(lost > 0.8 * change, "{lost} of {change}");
    }
}
