//! The host in C.

fn main() {
    println!("cargo:rerun-if-changed=abi.c");
    println!("cargo:rerun-if-changed=../../plugin-api/include/locum.h");
    cc::Build::new()
        .file("abi.c")
        .include("../../plugin-api/include")
        .std("c11")
        .warnings_into_errors(true)
        .compile("locum-fuzz-abi");
}
