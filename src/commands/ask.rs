//! Asking every running process the same, for the verbs that show what runs.

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use super::UsageError;
use crate::cli::{Global, WhichConnsArgs};
use crate::control::client::{self, Client, Found};
use crate::control::messages::Request;
use crate::overview::Process;
use crate::relay::view::Filter;
use crate::runtime_dir::RuntimeDir;

/// The processes that run relays in this network namespace; there is at least one.
pub(super) struct Processes(Vec<Found>);

impl Processes {
    /// Connects to all of them.
    pub(super) fn find(global: &Global) -> anyhow::Result<Self> {
        let runtime = RuntimeDir::resolve(global.runtime_dir.clone());
        let found = client::find(&runtime)?;
        if found.is_empty() {
            bail!(
                "nothing runs here: no process answers in {} for this network namespace",
                runtime.path().display()
            );
        }
        Ok(Self(found))
    }

    /// Asks each in turn.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> anyhow::Result<Vec<T>> {
        self.0
            .iter_mut()
            .map(|Found { name, client }| one(name, client, request))
            .collect()
    }

    /// The state of every instance of every process, or of those named; each name has to be there.
    pub(super) fn status(&mut self, names: &[String]) -> anyhow::Result<Vec<Process>> {
        let mut processes: Vec<Process> = self.ask(&Request::Status {})?;
        known(&processes, names)?;
        if !names.is_empty() {
            for process in &mut processes {
                process.instances.retain(|one| names.contains(&one.name));
            }
            processes.retain(|process| !process.instances.is_empty());
        }
        Ok(processes)
    }

    /// Whether every name is an instance of some process.
    pub(super) fn check_names(&mut self, names: &[String]) -> anyhow::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        known(&self.ask(&Request::Status {})?, names)
    }
}

fn one<T: DeserializeOwned>(
    name: &str,
    client: &mut Client,
    request: &Request,
) -> anyhow::Result<T> {
    let answer = client
        .ask(request)
        .with_context(|| format!("the process of {name}"))?;
    serde_json::from_value(answer).with_context(|| {
        format!("the process of {name} answers in another form: is it another version? restart it")
    })
}

fn known(processes: &[Process], names: &[String]) -> anyhow::Result<()> {
    let running = || processes.iter().flat_map(|process| &process.instances);
    for name in names {
        if !running().any(|one| one.name == *name) {
            let all: Vec<&str> = running().map(|one| one.name.as_str()).collect();
            bail!("instance {name} does not run: there are {}", all.join(", "));
        }
    }
    Ok(())
}

/// What was typed, as a filter.
pub(super) fn filter(which: &WhichConnsArgs) -> Result<Filter, UsageError> {
    let idle_ms = which.idle.map(|idle| u64::try_from(idle.as_millis()));
    let idle_ms = idle_ms
        .transpose()
        .map_err(|_| UsageError("--idle is too long".to_owned()))?;
    Ok(Filter {
        id: None,
        client: which.client.map(|client| client.prefix),
        client_port: which.client.and_then(|client| client.port),
        proxy: which.proxy,
        idle_ms,
    })
}
