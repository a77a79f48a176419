//! What this machine is and has left, read from the system when asked.

#[cfg_attr(windows, path = "machine_windows.rs")]
#[cfg_attr(not(windows), path = "machine_unix.rs")]
mod system;

use serde::{Deserialize, Serialize};

use super::Fact;
use crate::kernels;
pub use system::disk_free_bytes;

/// A machine in numbers. Zero and empty mean that the system does not say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    /// Cores this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    /// What programs can still get without swapping.
    pub memory_free_bytes: u64,
    /// Features of the processor that the kernels know.
    pub features: Vec<String>,
    /// What the kernels compute with on this processor.
    pub kernels: String,
    /// Whether there is a driver for one that Locum knows.
    pub graphics: String,
}

/// Looks at the machine. Reads a few small files of the system, so not for the path of a step.
pub fn machine() -> Machine {
    let (memory_bytes, memory_free_bytes) = system::memory();
    let f = kernels::features();
    let known = [
        ("AVX2 and FMA", f.avx2_fma),
        ("AVX-512", f.avx512),
        ("AVX-512 VNNI", f.avx512_vnni),
        ("AVX-512 BF16", f.avx512_bf16),
        ("AVX-VNNI", f.avx_vnni),
    ];
    let plain = match (f.avx512, f.avx2_fma) {
        (true, _) => "f32 and bf16 weights with AVX-512",
        (false, true) => "f32 and bf16 weights with AVX2",
        _ => "f32 and bf16 weights without vector instructions of our own",
    };
    let bf16 = match (f.avx512_bf16_full_rate, f.avx512_bf16) {
        (true, _) => ", bf16 products with VDPBF16PS",
        (false, true) => ", bf16 widened (VDPBF16PS is no faster than f32 here)",
        (false, false) => ", bf16 widened",
    };
    let path = kernels::QuantPath::best();
    let why = match path {
        _ if f.avx512_vnni => "VPDPBUSD of 512 bits is here",
        _ if f.avx512 => "AVX-512 here has no VNNI",
        _ if f.avx_vnni => "VPDPBUSD of 256 bits is here, AVX-512 is not",
        _ if f.avx2_fma => "neither AVX-512 nor VNNI is here",
        _ => "AVX2 with FMA and F16C is not here",
    };
    let kernels = format!("{plain}{bf16}; q8 and q4 with {path:?} ({why})");
    Machine {
        processor: system::processor().unwrap_or_else(|| std::env::consts::ARCH.into()),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        memory_bytes,
        memory_free_bytes,
        features: known
            .iter()
            .filter(|k| k.1)
            .map(|k| k.0.to_string())
            .collect(),
        kernels,
        graphics: system::graphics().into(),
    }
}

impl Machine {
    /// As the report's reader should see it.
    pub fn facts(&self) -> Vec<Fact> {
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
        let mut facts = vec![
            Fact::new("Processor", &self.processor),
            Fact::new("Cores", self.cores.to_string()),
            Fact::new("Kernels", &self.kernels),
            Fact::new("Graphics processor", &self.graphics),
        ];
        if self.memory_bytes > 0 {
            let value = format!(
                "{}, {} free",
                gib(self.memory_bytes),
                gib(self.memory_free_bytes)
            );
            facts.insert(2, Fact::new("Memory", value));
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described_in_words_and_numbers() {
        let machine = machine();
        assert!(machine.cores >= 1 && !machine.processor.is_empty());
        if cfg!(any(target_os = "linux", windows)) {
            assert!(
                machine.memory_bytes >= machine.memory_free_bytes && machine.memory_free_bytes > 0
            );
        }
        assert!(machine.facts().iter().all(|f| !f.value.is_empty()));
    }

    #[test]
    fn free_space_is_told_for_a_folder_that_is_not_there_yet() {
        let folder = tempfile::tempdir().unwrap();
        assert!(disk_free_bytes(&folder.path().join("a/b/c")).unwrap() > 0);
    }
}
