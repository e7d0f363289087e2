//! `reload`: has every running process of this host read the files again.

use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Value, json};

use super::output::print_json;
use crate::cli::{Global, ReloadArgs};
use crate::control::client::{self, Error};
use crate::control::messages::{FailureKind, Request};
use crate::runtime_dir::RuntimeDir;

/// Runs the verb.
pub(super) fn run(global: &Global, args: &ReloadArgs) -> anyhow::Result<ExitCode> {
    ask_all(global, &Request::Reload {}, args.json, |answer| {
        let mut lines = Vec::new();
        for (what, key) in [
            ("started", "started"),
            ("stopped, open connections go on", "stopped"),
            ("changed", "changed"),
            ("new pathway (mark)", "pathways_appeared"),
            ("pathway not used any more (mark)", "pathways_disappeared"),
            ("note", "notes"),
        ] {
            for name in answer[key].as_array().into_iter().flatten() {
                lines.push(format!("{what}: {}", text(name)));
            }
        }
        for (name, reason) in answer["failing"].as_object().into_iter().flatten() {
            lines.push(format!("not running: {name}: {}", text(reason)));
        }
        lines.push(format!("unchanged: {}", answer["unchanged"]));
        lines
    })
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Asks every running process, and says what each answered; one that fails does not keep the others.
pub(super) fn ask_all(
    global: &Global,
    request: &Request,
    as_json: bool,
    shown: impl Fn(&Value) -> Vec<String>,
) -> anyhow::Result<ExitCode> {
    let runtime = RuntimeDir::resolve(global.runtime_dir.clone());
    let found = client::find(&runtime)?;
    if found.is_empty() {
        bail!(
            "nothing is running here: no control socket answers in {} for this network namespace",
            runtime.path().display()
        );
    }
    let mut code = ExitCode::SUCCESS;
    let mut answers = serde_json::Map::new();
    for mut process in found {
        let name = process
            .name
            .trim_end_matches(".instance")
            .trim_end_matches(".process")
            .to_owned();
        match process.client.ask(request) {
            Ok(answer) => {
                for line in shown(&answer).iter().filter(|_| !as_json) {
                    println!("{name}: {line}");
                }
                answers.insert(name, answer);
            }
            Err(error) => {
                eprintln!("{name}: {:#}", anyhow::anyhow!(describe(&error)));
                let kind = match &error {
                    Error::Failed(failure) => failure.kind,
                    _ => FailureKind::Failed,
                };
                code = ExitCode::from(if kind == FailureKind::Configuration {
                    2
                } else {
                    1
                });
                answers.insert(name, json!({ "error": describe(&error) }));
            }
        }
    }
    if as_json {
        print_json(&answers)?;
    }
    Ok(code)
}

fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
