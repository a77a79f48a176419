//! Names of a decoder's parameters: one small enum, printed as the Hugging Face name.

use super::config::{Architecture, Config};
use crate::ttt::TttMode;

/// A parameter's place in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParamId {
    /// (v, d)
    Embed,
    /// (d)
    FinalNorm,
    /// (v, d); absent where the embedding is tied to it.
    Head,
    Layer(u16, LayerParam),
}

/// A parameter of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerParam {
    InputNorm,
    Q,
    K,
    V,
    O,
    QNorm,
    KNorm,
    PostNorm,
    Gate,
    Up,
    Down,
    /// The filter and the projection of a layer that learns while it reads; see [`crate::ttt`].
    TttConv,
    TttProj,
}

/// The seven matrices of a block that LoRA can adapt.
pub const LINEARS: [LayerParam; 7] = [
    LayerParam::Q,
    LayerParam::K,
    LayerParam::V,
    LayerParam::O,
    LayerParam::Gate,
    LayerParam::Up,
    LayerParam::Down,
];

impl LayerParam {
    /// Name of the module within its block.
    pub fn module(self) -> &'static str {
        match self {
            Self::InputNorm => "input_layernorm",
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::QNorm => "self_attn.q_norm",
            Self::KNorm => "self_attn.k_norm",
            Self::PostNorm => "post_attention_layernorm",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::TttConv => "mlp.ttt_conv",
            Self::TttProj => "mlp.ttt_proj",
        }
    }

    /// (out, in) of a matrix, (n) of a norm, (d, 1, k) of a filter of k taps a channel.
    pub fn shape(self, config: &Config) -> Vec<usize> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::InputNorm | Self::PostNorm => vec![d],
            Self::QNorm | Self::KNorm => vec![config.head_dim],
            Self::Q => vec![config.q_size(), d],
            Self::K | Self::V => vec![config.kv_size(), d],
            Self::O => vec![d, config.q_size()],
            Self::Gate | Self::Up => vec![f, d],
            Self::Down => vec![d, f],
            Self::TttConv => vec![d, 1, config.ttt.as_ref().map_or(0, |t| t.kernel_size)],
            Self::TttProj => vec![d, d],
        }
    }
}

impl ParamId {
    /// The Hugging Face name.
    pub fn name(self) -> String {
        match self {
            Self::Embed => "model.embed_tokens.weight".into(),
            Self::FinalNorm => "model.norm.weight".into(),
            Self::Head => "lm_head.weight".into(),
            Self::Layer(i, p) => format!("model.layers.{i}.{}.weight", p.module()),
        }
    }

    /// Shape of the tensor.
    pub fn shape(self, config: &Config) -> Vec<usize> {
        match self {
            Self::Embed | Self::Head => vec![config.vocab_size, config.hidden_size],
            Self::FinalNorm => vec![config.hidden_size],
            Self::Layer(_, p) => p.shape(config),
        }
    }

    /// Whether it is the filter or the projection of a layer that learns while it reads. Its gradient is zero where no sequence is
    /// longer than a chunk.
    pub fn is_of_learning_layer(self) -> bool {
        matches!(
            self,
            Self::Layer(_, LayerParam::TttConv | LayerParam::TttProj)
        )
    }

    /// All parameters of a model, in the order of the computation.
    pub fn all(config: &Config) -> Vec<ParamId> {
        use LayerParam::*;
        let in_place = config.ttt.as_ref();
        let in_place = in_place.filter(|t| t.mode == TttMode::InPlace);
        let mut ids = vec![Self::Embed];
        for i in 0..config.num_hidden_layers as u16 {
            let mut push = |p| ids.push(Self::Layer(i, p));
            [InputNorm, Q, K, V].into_iter().for_each(&mut push);
            if config.architecture == Architecture::Qwen3 {
                [QNorm, KNorm].into_iter().for_each(&mut push);
            }
            [O, PostNorm, Gate, Up, Down]
                .into_iter()
                .for_each(&mut push);
            if let Some(ttt) = in_place.filter(|t| t.layers.contains(&i)) {
                push(TttConv);
                if ttt.proj {
                    push(TttProj);
                }
            }
        }
        ids.push(Self::FinalNorm);
        if !config.tie_word_embeddings {
            ids.push(Self::Head);
        }
        ids
    }
}
