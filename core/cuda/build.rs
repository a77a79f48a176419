//! Puts the kernels into the object: the fat binary that `build.py` compiled, named by LOCUM_CUDA_KERNELS. Without it the object is
//! built all the same, for tests that run the kernels on the processor, and refuses real devices.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=LOCUM_CUDA_KERNELS");
    println!("cargo:rerun-if-changed=../src/device/table.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let kernels = match env::var_os("LOCUM_CUDA_KERNELS") {
        Some(path) => {
            println!("cargo:rerun-if-changed={}", PathBuf::from(&path).display());
            fs::read(&path).expect("LOCUM_CUDA_KERNELS names a file")
        }
        None => Vec::new(),
    };
    fs::write(out.join("kernels.fatbin"), kernels).expect("OUT_DIR can be written to");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
}
