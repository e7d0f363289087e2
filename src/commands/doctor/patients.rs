//! From configuration and running processes to what the doctor is asked.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cli::Global;
use crate::config::Configuration;
use crate::control::client::{self, Client};
use crate::control::messages::Request;
use crate::doctor::evidence::{Relay, RelayError};
use crate::doctor::{Asked, Asker, host};
use crate::model::Instance;
use crate::overview::{Explanation, InstanceReport, Process};
use crate::pathway::Firewall;
use crate::relay::report::LastError;
use crate::relay::view::{Connection, Filter, Stage};
use crate::runtime_dir::RuntimeDir;

/// Where the files are unless somebody says otherwise.
const USUAL: &str = "/etc/mmproxy";

/// Who asks: what is typed before a verb so that it means the same files and processes.
pub(in crate::commands) fn asker(global: &Global) -> Asker {
    let directory = &global.config_dir;
    let from_environment =
        std::env::var_os("MMPROXY_CONFIG_DIR").is_some_and(|env| env == **directory);
    let mut command = "mmproxyctl".to_owned();
    if directory != Path::new(USUAL) && !from_environment {
        command.push_str(&format!(" --config-dir {}", directory.display()));
    }
    if let Some(directory) = &global.runtime_dir {
        command.push_str(&format!(" --runtime-dir {}", directory.display()));
    }
    if global.firewall != Firewall::default() && std::env::var_os("MMPROXY_FIREWALL").is_none() {
        command.push_str(&format!(" --firewall {}", global.firewall.name()));
    }
    Asker {
        command,
        config_dir: directory.display().to_string(),
        firewall: global.firewall,
    }
}

/// What the doctor is asked about one instance.
pub(in crate::commands) fn asked(
    configuration: &Configuration,
    instance: &Instance,
    running: &BTreeMap<String, Relay>,
) -> Option<Asked> {
    let allow_file = match &instance.options.allow {
        Some(file) => configuration.directory.join(file),
        None => configuration.default_allow_path.clone(),
    };
    Some(Asked {
        instance: instance.clone(),
        pathway: configuration.pathway_of(instance)?.clone(),
        configured: true,
        allow: configuration.allow_list(instance).prefixes().to_vec(),
        allow_file: allow_file.display().to_string(),
        relay: running.get(instance.name.as_str()).cloned(),
    })
}

/// What the processes of this network namespace say about their instances; none where nothing runs.
pub(in crate::commands) fn running(runtime: &RuntimeDir) -> BTreeMap<String, Relay> {
    let mut relays = BTreeMap::new();
    for mut found in client::find(runtime).unwrap_or_default() {
        let Some(process) = ask::<Process>(&mut found.client, &Request::Status {}) else {
            continue;
        };
        let everything = Request::Explain {
            filter: Filter::default(),
        };
        let troubled = process
            .instances
            .iter()
            .any(|one| !one.recent_errors.is_empty());
        // the connections are of interest only where some went wrong
        let connections = troubled
            .then(|| ask::<Explanation>(&mut found.client, &everything))
            .flatten();
        let connections: Vec<Connection> = connections
            .map(|all| all.open.into_iter().chain(all.ended).collect())
            .unwrap_or_default();
        for report in &process.instances {
            relays.insert(
                report.name.clone(),
                relay(process.pid, report, &connections),
            );
        }
    }
    relays
}

fn ask<T: serde::de::DeserializeOwned>(client: &mut Client, request: &Request) -> Option<T> {
    serde_json::from_value(client.ask(request).ok()?).ok()
}

fn relay(pid: u32, report: &InstanceReport, connections: &[Connection]) -> Relay {
    let errors = report.recent_errors.iter();
    let limits = host::descriptor_limits(pid);
    Relay {
        pid,
        descriptors: limits.map(|(soft, _)| soft),
        descriptors_at_most: limits.map(|(_, hard)| hard),
        accept_pauses: report.totals.accept_pauses,
        errors: errors
            .map(|error| met(error, &report.name, connections))
            .collect(),
    }
}

fn met(error: &LastError, instance: &str, connections: &[Connection]) -> RelayError {
    let proxy: IpAddr = error.proxy.ip();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let ago = now
        .unwrap_or_default()
        .saturating_sub(Duration::from_secs(error.at));
    let mended = connections.iter().any(|one| {
        let quiet = one.ended.as_ref().map_or(one.age_ms, |ended| ended.ago_ms);
        one.instance == instance
            && one.proxy.ip() == proxy
            && one.stage == Stage::Relaying
            && u128::from(quiet) < ago.as_millis()
    });
    RelayError {
        kind: error.kind.clone(),
        proxy,
        client: error.client.map(|client| client.ip()),
        ago: ago.as_secs(),
        message: error.message.clone(),
        mended,
    }
}
