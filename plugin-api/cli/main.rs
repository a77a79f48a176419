//! The operator's command. Everything it does is in the library beside it, so that tests can call it.

fn main() -> std::process::ExitCode {
    locum_cli::run(std::env::args_os())
}
