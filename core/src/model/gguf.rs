//! GGUF files in: a header that is not trusted, and tensors whose quantised blocks candle expands.
//!
//! The header is read here, so that whatever is wrong with a tensor is said with the tensor's name, and so that nothing is allocated
//! for what a file claims before the file is seen to be large enough for it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{gguf_file::Value, GgmlDType};
use candle_core::Device;
use serde_json::json;

use super::config::{Architecture, Config};
use super::params::{LayerParam, ParamId};
use super::weights::{check_finite, check_shape, Weights};
use super::ModelError;

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
/// Dimensions of a tensor, as in ggml.
const MAX_DIMS: u32 = 4;
/// Lists within lists; no key that is read here has any.
const MAX_DEPTH: usize = 4;
/// Elements of all lists together; the largest vocabulary here with its merges has three million.
const MAX_ELEMENTS: u64 = 1 << 23;
/// Where tensors begin, in bytes, unless the file says otherwise.
const ALIGNMENT: u64 = 32;

/// What a GGUF file holds: the model, and the metadata from which the tokenizer is made.
pub struct Gguf {
    pub config: Config,
    pub weights: Weights,
    pub metadata: HashMap<String, Value>,
}

/// Reads a Llama- or Qwen3-type GGUF file and expands its weights to `f32`. F32, F16, BF16 and the quantised types that candle knows
/// (Q4_0 to Q8_0, Q2_K to Q6_K) are taken.
///
/// llama.cpp stores the query and key rows of a Llama in interleaved-rotary order; they are brought back to half-split order.
///
/// # Errors
/// A file that is cut short, another architecture, a missing tensor, a wrong shape, an unknown type; each names the tensor or the key.
pub fn read_gguf(path: &Path) -> Result<Gguf, ModelError> {
    let bad = |why: String| ModelError::File {
        path: path.into(),
        why,
    };
    let file = File::open(path).map_err(|e| ModelError::io(path, e))?;
    let size = file.metadata().map_err(|e| ModelError::io(path, e))?.len();
    let mut reader = Reader {
        file: BufReader::new(file),
        at: 0,
        size,
        elements: 0,
    };
    let header = reader
        .header()
        .map_err(|why| bad(format!("not a readable GGUF file: {why}")))?;
    let (config, architecture) = config(&header).map_err(|e| match e {
        Refused::File(why) => bad(why),
        Refused::Model(error) => error,
    })?;
    let mut params = BTreeMap::new();
    let mut taken = 0;
    for id in ParamId::all(&config) {
        let name = gguf_name(id);
        let info = header
            .tensors
            .get(&name)
            .ok_or_else(|| ModelError::MissingTensor(name.clone()))?;
        check_shape(&name, &info.shape, &id.shape(&config))?;
        let refuse = |why: String| ModelError::Tensor {
            name: name.clone(),
            why,
        };
        let (begin, bytes) = header.place(info, size).map_err(&refuse)?;
        // Tensors that lie upon each other could claim the file's size many times over.
        taken += bytes;
        if taken > size {
            return Err(refuse(format!(
                "the tensors up to it need {taken} bytes, the file has {size}"
            )));
        }
        let data = reader
            .tensor(info, begin, bytes)
            .map_err(|e| refuse(e.to_string()))?;
        check_finite(&name, &data)?;
        let data = match (architecture, id) {
            (Architecture::Llama, ParamId::Layer(_, LayerParam::Q)) => {
                half_split(&data, config.num_attention_heads, config.hidden_size)
            }
            (Architecture::Llama, ParamId::Layer(_, LayerParam::K)) => {
                half_split(&data, config.num_key_value_heads, config.hidden_size)
            }
            _ => data,
        };
        params.insert(id, Arc::new(data));
    }
    Ok(Gguf {
        config,
        weights: Weights { params },
        metadata: header.metadata,
    })
}

struct Header {
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Info>,
    /// Where the tensors' bytes begin.
    data: u64,
}

/// A tensor as the header has it.
struct Info {
    /// The slowest dimension first, as everywhere in Locum; the file has the fastest first.
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

enum Refused {
    File(String),
    Model(ModelError),
}

impl Header {
    /// Where a tensor whose shape is known to be right lies in a file of this size: first byte and number of bytes.
    fn place(&self, info: &Info, size: u64) -> Result<(u64, u64), String> {
        let dtype = dtype(info.kind).ok_or(format!("type {} is not supported", info.kind))?;
        let row = *info.shape.last().unwrap_or(&0);
        let block = dtype.block_size();
        if !row.is_multiple_of(block) {
            return Err(format!(
                "rows of {row} cannot be in {dtype:?}, which has blocks of {block}"
            ));
        }
        let elements: usize = info.shape.iter().product();
        let bytes = (elements / block * dtype.type_size()) as u64;
        let begin = self.data.checked_add(info.offset);
        let left = begin.map_or(0, |begin| size.saturating_sub(begin));
        match begin {
            Some(begin) if bytes <= left => Ok((begin, bytes)),
            _ => Err(format!(
                "it needs {bytes} bytes where the file has {left} left"
            )),
        }
    }
}

fn dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// The model's dimensions, from the metadata and the embedding's shape.
fn config(header: &Header) -> Result<(Config, Architecture), Refused> {
    let get = |key: &str| header.metadata.get(key);
    let bad = |why: String| Refused::File(why);
    let arch = get("general.architecture")
        .and_then(|v| v.to_string().ok())
        .ok_or_else(|| bad("general.architecture is missing".into()))?;
    let architecture = match arch.as_str() {
        "llama" => Architecture::Llama,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(Refused::Model(ModelError::Unsupported(format!(
                "GGUF architecture {other:?}: Locum runs Llama- and Qwen3-type decoders"
            ))))
        }
    };
    let number = |key: &str| {
        let key = format!("{arch}.{key}");
        get(&key)
            .and_then(|v| v.to_u64().ok())
            .map(|n| n as usize)
            .ok_or_else(|| bad(format!("{key} is missing or no number")))
    };
    let float = |key: &str, default: f64| {
        get(&format!("{arch}.{key}"))
            .and_then(|v| v.to_f32().ok())
            .filter(|x| x.is_finite())
            .map_or(default, shortest)
    };
    let embed = "token_embd.weight";
    let vocab_size = match header.tensors.get(embed).map(|info| &info.shape[..]) {
        Some([v, _]) => *v,
        Some(shape) => {
            return Err(Refused::Model(ModelError::Tensor {
                name: embed.into(),
                why: format!("shape {shape:?}, not rows of embeddings"),
            }))
        }
        None => return Err(Refused::Model(ModelError::MissingTensor(embed.into()))),
    };
    let (d, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let mut raw = Config::llama_json(
        vocab_size,
        d,
        number("feed_forward_length")?,
        number("block_count")?,
        heads,
        number("attention.head_count_kv").unwrap_or(heads),
        number("context_length")?,
        float("attention.layer_norm_rms_epsilon", 1e-5),
        float("rope.freq_base", 10_000.0),
        !header.tensors.contains_key("output.weight"),
    );
    if let Ok(head_dim) = number("attention.key_length") {
        raw["head_dim"] = json!(head_dim);
    }
    if architecture == Architecture::Qwen3 {
        raw["model_type"] = json!("qwen3");
        raw["architectures"] = json!(["Qwen3ForCausalLM"]);
    }
    for (name, key) in [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ] {
        if let Some(id) = get(key).and_then(|v| v.to_u32().ok()) {
            raw[name] = json!(id);
        }
    }
    let config = Config::from_json(&raw).map_err(Refused::Model)?;
    Ok((config, architecture))
}

/// A file whose every claim is held against the bytes that are left.
struct Reader {
    file: BufReader<File>,
    at: u64,
    size: u64,
    /// Of lists, so far.
    elements: u64,
}

impl Reader {
    fn header(&mut self) -> Result<Header, String> {
        let magic = self.u32()?;
        if magic != MAGIC {
            return Err(format!("unknown magic 0x{magic:08x}"));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("version {version} of the format"));
        }
        // A tensor takes 24 bytes at least, an entry 13.
        let n_tensors = self.count(24, "tensors")?;
        let n_entries = self.count(13, "entries")?;
        let mut metadata = HashMap::new();
        for _ in 0..n_entries {
            let key = self.string()?;
            let kind = self.u32()?;
            let value = self
                .value(kind, 0)
                .map_err(|why| format!("{}: {why}", shown(&key)))?;
            metadata.insert(key, value);
        }
        let mut tensors = HashMap::new();
        for n in 0..n_tensors {
            let name = self
                .string()
                .map_err(|why| format!("tensor number {n}: {why}"))?;
            let info = self
                .info()
                .map_err(|why| format!("tensor {}: {why}", shown(&name)))?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor {} is there twice", shown(&name)));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match value.to_u64() {
                Ok(n) if n.is_power_of_two() && n <= 1 << 20 => n,
                _ => return Err("general.alignment is no small power of two".into()),
            },
        };
        Ok(Header {
            metadata,
            tensors,
            data: self.at.next_multiple_of(alignment),
        })
    }

    fn info(&mut self) -> Result<Info, String> {
        let n_dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(format!("{n_dims} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let n = self.u64()?;
            shape.push(usize::try_from(n).map_err(|_| format!("a dimension of {n}"))?);
        }
        shape.reverse();
        let elements = shape.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        if elements.is_none_or(|n| n == 0) {
            return Err(format!("shape {shape:?}"));
        }
        Ok(Info {
            shape,
            kind: self.u32()?,
            offset: self.u64()?,
        })
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::U8(self.bytes::<1>()?[0]),
            1 => Value::I8(self.bytes::<1>()?[0] as i8),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32()?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let n = self.count(least, "elements")?;
                self.elements += n;
                if self.elements > MAX_ELEMENTS {
                    return Err(format!("more than {MAX_ELEMENTS} elements in lists"));
                }
                let mut list = Vec::new();
                for _ in 0..n {
                    list.push(self.value(kind, depth + 1)?);
                }
                Value::Array(list)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            9 => return Err("lists within lists within lists".into()),
            other => return Err(format!("a value of type {other}")),
        })
    }

    /// How many of something follow that takes at least so many bytes each.
    fn count(&mut self, least: u64, of: &str) -> Result<u64, String> {
        let n = self.u64()?;
        let left = self.size.saturating_sub(self.at);
        match n.checked_mul(least) {
            Some(bytes) if bytes <= left => Ok(n),
            _ => Err(format!("{n} {of} in the {left} bytes that are left")),
        }
    }

    fn string(&mut self) -> Result<String, String> {
        let n = self.count(1, "bytes of text")?;
        let mut bytes = vec![0; n as usize];
        self.fill(&mut bytes)?;
        // Some writers count a zero at the end.
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.file
            .read_exact(bytes)
            .map_err(|e| format!("at byte {}: {e}", self.at))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// A tensor whose place was checked, in `f32`.
    fn tensor(&mut self, info: &Info, begin: u64, bytes: u64) -> candle_core::Result<Vec<f32>> {
        let dtype = dtype(info.kind).expect("its place was found by its type");
        let mut raw = vec![0; bytes as usize];
        self.file.seek(SeekFrom::Start(begin))?;
        self.file.read_exact(&mut raw)?;
        qtensor_from_ggml(dtype, &raw, info.shape.clone(), &Device::Cpu)?
            .dequantize(&Device::Cpu)?
            .flatten_all()?
            .to_vec1()
    }
}

/// A name from a file, short enough for a sentence.
fn shown(name: &str) -> String {
    format!("{:?}", name.chars().take(64).collect::<String>())
}

/// The shortest decimal that reads back as this `f32`: 1e-5 stored as f32 is 1e-5 again, and not 9.99999974e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a printed f32 is a number")
}

/// Rows of each head from interleaved (0, e/2, 1, e/2 + 1, ... of the original) back to half-split order.
fn half_split(rows: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let e = rows.len() / width / heads;
    let mut out = vec![0.0; rows.len()];
    for head in 0..heads {
        for i in 0..e {
            let from = (head * e + 2 * (i % (e / 2)) + i / (e / 2)) * width;
            let to = (head * e + i) * width;
            out[to..to + width].copy_from_slice(&rows[from..from + width]);
        }
    }
    out
}

fn gguf_name(id: ParamId) -> String {
    match id {
        ParamId::Embed => "token_embd.weight".into(),
        ParamId::FinalNorm => "output_norm.weight".into(),
        ParamId::Head => "output.weight".into(),
        ParamId::Layer(i, p) => {
            let part = match p {
                LayerParam::InputNorm => "attn_norm",
                LayerParam::Q => "attn_q",
                LayerParam::K => "attn_k",
                LayerParam::V => "attn_v",
                LayerParam::O => "attn_output",
                LayerParam::QNorm => "attn_q_norm",
                LayerParam::KNorm => "attn_k_norm",
                LayerParam::PostNorm => "ffn_norm",
                LayerParam::Gate => "ffn_gate",
                LayerParam::Up => "ffn_up",
                LayerParam::Down => "ffn_down",
                // No GGUF file has them, and its config asks for none.
                LayerParam::TttConv => "ttt_conv",
                LayerParam::TttProj => "ttt_proj",
            };
            format!("blk.{i}.{part}.weight")
        }
    }
}

#[cfg(test)]
mod tests;
