//! `reload`: has every running process of this host read the files again.

use std::io::Write;
use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Value, json};

use super::output::{print_json, results};
use crate::causes::with_causes;
use crate::cli::{Global, ReloadArgs};
use crate::control::client::{self, Client, Error};
use crate::control::messages::{FailureKind, Request};
use crate::runtime_dir::RuntimeDir;

/// Runs the verb.
pub(super) fn run(global: &Global, args: &ReloadArgs) -> anyhow::Result<ExitCode> {
    let how = Asking {
        request: Request::Reload {},
        of: &args.processes,
        json: args.json,
    };
    ask(global, &how, |answer| {
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

/// A request to running processes.
pub(super) struct Asking<'a> {
    pub(super) request: Request,
    /// Their names; none means all of them.
    pub(super) of: &'a [String],
    pub(super) json: bool,
}

/// Asks running processes, and says what each answered; one that fails does not keep the others.
pub(super) fn ask(
    global: &Global,
    how: &Asking<'_>,
    shown: impl Fn(&Value) -> Vec<String>,
) -> anyhow::Result<ExitCode> {
    let runtime = RuntimeDir::resolve(global.runtime_dir.clone());
    let mut found: Vec<(String, Client)> = client::find(&runtime)?
        .into_iter()
        // they have no instances any more
        .filter(|process| !client::is_draining(&process.name))
        .map(|process| (shown_name(&process.name).to_owned(), process.client))
        .collect();
    if found.is_empty() {
        bail!(
            "nothing is running here: no control socket answers in {} for this network namespace",
            runtime.path().display()
        );
    }
    if let Some(missing) = how
        .of
        .iter()
        .find(|name| found.iter().all(|(known, _)| known != *name))
    {
        let known: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        bail!(
            "no process '{missing}' is running here: there are {}",
            known.join(", ")
        );
    }
    found.retain(|(name, _)| how.of.is_empty() || how.of.contains(name));
    let mut code = 0;
    let mut answers = serde_json::Map::new();
    for (name, mut client) in found {
        match client.ask(&how.request) {
            Ok(answer) => {
                if how.request == (Request::Release {}) {
                    client.wait_closed()?;
                }
                if leaves_one_down(&answer) {
                    code = code.max(1);
                }
                for line in shown(&answer).iter().filter(|_| !how.json) {
                    writeln!(results(), "{name}: {line}")?;
                }
                answers.insert(name, answer);
            }
            Err(error) => {
                super::say(&format!("{name}: {}", with_causes(&error)));
                let kind = match &error {
                    Error::Failed(failure) => failure.kind,
                    _ => FailureKind::Failed,
                };
                code = code.max(match kind {
                    FailureKind::Configuration => 2,
                    FailureKind::Failed => 1,
                });
                answers.insert(name, json!({ "error": with_causes(&error) }));
            }
        }
    }
    if how.json {
        print_json(&answers)?;
    }
    Ok(ExitCode::from(code))
}

/// Whether the files were taken and one of the instances does not run.
fn leaves_one_down(answer: &Value) -> bool {
    let failing = answer["failing"].as_object();
    failing.is_some_and(|failing| !failing.is_empty())
}

/// The name of a process without what keeps it apart from other files.
fn shown_name(name: &str) -> &str {
    name.strip_suffix(".instance")
        .or_else(|| name.strip_suffix(".process"))
        .unwrap_or(name)
}
