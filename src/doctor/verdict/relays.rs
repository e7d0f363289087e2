//! What a running relay has met lately, and where it listens.

use std::net::IpAddr;

use super::{Diagnosis, Fault, Fix, Severity, command};
use crate::doctor::evidence::{Evidence, Instance, Relay, RelayError};
use crate::model::Family;

/// For how many seconds an error counts.
const RECENT: u64 = 15 * 60;

/// As many descriptors as a relay needs at the very least: 2,000 connections.
const FEW: u64 = 4096;

/// As many as the units give.
const MANY: u64 = 1_048_576;

/// What is wrong with an instance, apart from its targets.
pub(super) fn judge(evidence: &Evidence, instance: &Instance) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    found.extend(listen(evidence, instance));
    if let Some(relay) = &instance.relay {
        found.extend(descriptors(instance, relay));
        let recent = relay.errors.iter().filter(|error| error.ago < RECENT);
        found.extend(recent.filter_map(|error| proxy(evidence, instance, error)));
    }
    found
}

fn diagnosis(
    instance: &Instance,
    fault: Fault,
    verdict: String,
    evidence: Vec<String>,
    fix: Fix,
) -> Diagnosis {
    Diagnosis {
        fault,
        severity: Severity::Fault,
        instances: vec![instance.name.clone()],
        verdict,
        evidence,
        fix,
    }
}

fn listen(evidence: &Evidence, instance: &Instance) -> Option<Diagnosis> {
    let ip = instance.listen.filter(|_| !instance.listen_here)?.ip();
    let (family, length) = match ip {
        IpAddr::V4(_) => (Family::V4, 32),
        IpAddr::V6(_) => (Family::V6, 128),
    };
    let way_out = evidence.host.default_route.get(&family).cloned().flatten();
    let interface = way_out.unwrap_or_else(|| "lo".to_owned());
    Some(diagnosis(
        instance,
        Fault::ListenAddressAbsent,
        format!("the listen address {ip} is on no interface: no proxy can connect to it"),
        Vec::new(),
        Fix::run([format!("ip address add {ip}/{length} dev {interface}")])
            .knowing("or bring up the interface (a VPN?) that has it, or correct listen_addr"),
    ))
}

fn descriptors(instance: &Instance, relay: &Relay) -> Option<Diagnosis> {
    let limit = relay.descriptors?;
    // only a program with CAP_SYS_RESOURCE can raise the hard limit
    let most = relay.descriptors_at_most;
    let more = most.filter(|most| *most >= FEW).unwrap_or(MANY);
    let connections = instance.max_connections.map_or(0, u64::from);
    let needed = FEW.max(2 * connections + 64);
    let ran_out = relay.accept_pauses > 0 && limit < MANY / 16;
    if limit >= needed && !ran_out {
        return None;
    }
    let mut seen = vec![format!("its limit is {limit}; each connection takes 2")];
    if relay.accept_pauses > 0 {
        seen.push(format!(
            "accepting paused {} times because they ran out",
            relay.accept_pauses
        ));
    }
    Some(diagnosis(
        instance,
        Fault::DescriptorLimit,
        format!(
            "the relay (pid {}) may open {limit} descriptors only: enough for {} connections",
            relay.pid,
            limit / 2
        ),
        seen,
        Fix::run([format!(
            "prlimit --pid {} --nofile={more}:{more}",
            relay.pid
        )])
        .knowing("for good: LimitNOFILE= in its unit, ulimit -n where it is started by hand"),
    ))
}

fn proxy(evidence: &Evidence, instance: &Instance, error: &RelayError) -> Option<Diagnosis> {
    let RelayError {
        kind,
        proxy,
        message,
        mended,
        ..
    } = error;
    let seen = vec![message.clone()];
    match kind.as_str() {
        "proxy-not-allowed" => {
            if instance.allow.iter().any(|net| net.contains(proxy)) {
                return None;
            }
            let mut commands = vec![format!("printf '\\n{proxy}\\n' >>{}", instance.allow_file)];
            commands.push(command(evidence, "reload"));
            Some(diagnosis(
                instance,
                Fault::ProxyNotAllowed,
                format!("{proxy} knocks and is not on the allow list"),
                seen,
                Fix::run(commands)
                    .knowing("only if it is your proxy: who is on the list may claim to be anyone"),
            ))
        }
        _ if *mended => None,
        "header-timeout" if message.contains("not a byte") => Some(diagnosis(
            instance,
            Fault::LateHeader,
            format!(
                "{proxy} connects and sends nothing: a health check that only connects, or a balancer that sends the header with the client's first bytes (AWS NLB)"
            ),
            seen,
            Fix::advise(
                "with such a balancer a protocol in which the server speaks first (ssh, smtp, mysql) cannot work: put HAProxy between, or a listener whose client speaks first",
            ),
        )),
        "no-header" | "bad-header" | "header-truncated" | "header-timeout" => Some(diagnosis(
            instance,
            Fault::NoHeader,
            match kind.as_str() {
                "no-header" => format!("{proxy} sends no PROXY header"),
                _ => format!("{proxy} sends a PROXY header that is broken or cut off"),
            },
            seen,
            Fix::advise(
                "on the proxy: send-proxy-v2 on the server line (HAProxy), proxy_protocol on (nginx)",
            ),
        )),
        _ => None,
    }
}
