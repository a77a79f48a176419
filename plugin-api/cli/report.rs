//! `locum report`: the store's life as one HTML file.

use std::path::PathBuf;

use serde_json::json;

use crate::fail::Fail;
use crate::out::Out;
use crate::Place;

#[derive(clap::Args)]
pub struct Args {
    /// File to write, `-` for stdout
    #[arg(long, short, default_value = "locum-report.html")]
    output: PathBuf,
    /// Policy whose name and settings the page shows; the one that Locum ships if not given
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

pub fn run(args: Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let html = place.locum(args.policy.as_deref(), false)?.report_html()?;
    if args.output.as_os_str() == "-" {
        out.raw(html.trim_end());
        return Ok(());
    }
    std::fs::write(&args.output, &html).map_err(|source| Fail::Write {
        path: args.output.clone(),
        source,
    })?;
    out.line(&format!(
        "{} written ({} KiB); open it in any browser",
        args.output.display(),
        html.len().div_ceil(1024)
    ));
    out.result(&json!({ "report": args.output, "bytes": html.len() }));
    Ok(())
}
