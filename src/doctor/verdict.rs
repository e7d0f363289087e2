//! From evidence to diagnoses. Pure: the same evidence gives the same verdict anywhere.
//!
//! | file | judges |
//! |---|---|
//! | `pathways` | missing pieces, leftovers, IPv6 |
//! | `marks` | bits of the mark that others use |
//! | `ways` | one target: the service, rules in the way, firewalls, filters |
//! | `relays` | what a running relay has met: proxies, headers, descriptors |
//! | `edits` | the commands that change configuration files |
//!
//! Causes come before consequences: where a piece of a pathway is missing, a time-out needs no other
//! explanation.

mod edits;
mod firewalls;
mod marks;
mod pathways;
mod relays;
#[cfg(test)]
mod tests;
mod ways;

use super::evidence::{Evidence, Instance, Pathway};
use super::fault::{Diagnosis, Fault, Fix, Severity};

/// All that is wrong, the likeliest cause first; notes behind the faults.
pub fn judge(evidence: &Evidence) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    if let Some(cannot) = &evidence.host.cannot_spoof {
        found.push(pathways::cannot_spoof(evidence, cannot));
        return found;
    }
    found.extend(pathways::judge(evidence));
    found.extend(marks::judge(evidence));
    found.extend(host(evidence));
    for instance in &evidence.instances {
        found.extend(relays::judge(evidence, instance));
        for target in &instance.targets {
            found.extend(ways::judge(evidence, instance, target));
        }
    }
    let mut merged = merge(found);
    merged.sort_by_key(|one| (one.severity, one.fault));
    merged
}

/// What is wrong with the host, whatever the instances.
fn host(evidence: &Evidence) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    let names = || every_name(evidence);
    if let Some(networkd) = &evidence.host.networkd
        && (networkd.removes_rules || networkd.removes_routes)
    {
        found.push(Diagnosis {
            fault: Fault::NetworkdRemovesRules,
            severity: Severity::Fault,
            instances: names(),
            verdict: "systemd-networkd removes the rules and routes of others whenever it is reconfigured".to_owned(),
            evidence: vec![format!(
                "systemd-networkd runs here (pid {}) without ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no",
                networkd.pid
            )],
            fix: Fix::run([
                "mkdir -p /etc/systemd/networkd.conf.d && printf '[Network]\\nManageForeignRoutingPolicyRules=no\\nManageForeignRoutes=no\\n' >/etc/systemd/networkd.conf.d/mmproxy.conf".to_owned(),
                "systemctl restart systemd-networkd".to_owned(),
            ]),
        });
    }
    let tracks = evidence.pathways.iter().any(|pathway| pathway.connmark);
    if let Some(table) = evidence.host.conntrack
        && tracks
        && table.max > 0
        && table.count >= table.max - table.max / 50
    {
        found.push(Diagnosis {
            fault: Fault::ConntrackFull,
            severity: Severity::Fault,
            instances: names(),
            verdict: format!(
                "connection tracking's table is full: {} of {} entries: new connections are dropped",
                table.count, table.max
            ),
            evidence: Vec::new(),
            fix: Fix::run([format!(
                "sysctl -w net.netfilter.nf_conntrack_max={}",
                table.max.saturating_mul(2)
            )])
            .knowing("connmark=auto in pathways.conf does without connection tracking where all targets are on loopback"),
        });
    }
    found
}

fn every_name(evidence: &Evidence) -> Vec<String> {
    let all = evidence.instances.iter();
    all.map(|instance| instance.name.clone()).collect()
}

/// The instances of a pathway.
fn names_of(evidence: &Evidence, pathway: &Pathway) -> Vec<String> {
    let all = evidence.instances.iter();
    all.filter(|instance| instance.mark == pathway.mark)
        .map(|instance| instance.name.clone())
        .collect()
}

fn pathway_of<'e>(evidence: &'e Evidence, instance: &Instance) -> Option<&'e Pathway> {
    let mut all = evidence.pathways.iter();
    all.find(|pathway| pathway.mark == instance.mark)
}

/// The program with a verb.
fn command(evidence: &Evidence, verb: &str) -> String {
    let program = evidence.host.command.as_str();
    let program = if program.is_empty() {
        "mmproxyctl"
    } else {
        program
    };
    format!("{program} {verb}")
}

/// The same said of several instances becomes one.
fn merge(found: Vec<Diagnosis>) -> Vec<Diagnosis> {
    let mut merged = Vec::<Diagnosis>::new();
    for one in found {
        let same = merged
            .iter_mut()
            .find(|other| other.fault == one.fault && other.verdict == one.verdict);
        match same {
            Some(other) => {
                for name in one.instances {
                    if !other.instances.contains(&name) {
                        other.instances.push(name);
                    }
                }
                other.severity = other.severity.min(one.severity);
            }
            None => merged.push(one),
        }
    }
    merged
}
