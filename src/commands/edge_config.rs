//! `edge-config`: prints the proxy's side of an instance.

use std::io::Write;
use std::process::ExitCode;

use super::UsageError;
use super::output::results;
use crate::cli::{EdgeConfigArgs, Global};
use crate::config;
use crate::edge::{Edge, snippet};

/// Runs the verb.
pub(super) fn run(global: &Global, args: &EdgeConfigArgs) -> anyhow::Result<ExitCode> {
    // no allow list is needed for this
    let files = config::load_pathways(&global.config_dir)?;
    let Some(instance) = files.instance(&args.instance) else {
        let known: Vec<&str> = files
            .instances
            .iter()
            .map(|instance| instance.name.as_str())
            .collect();
        return Err(UsageError(format!(
            "no instance '{}' in {}: there are {}",
            args.instance,
            files.directory.join("instances.tsv").display(),
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        ))
        .into());
    };
    let text = Edge::of(instance, args.address, args.public_port.map(Into::into))
        .and_then(|edge| snippet(instance, args.kind, edge))
        .map_err(|error| UsageError(error.to_string()))?;
    results().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
