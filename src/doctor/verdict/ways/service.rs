//! Whether a target's service is there, and is the one that is meant.

use std::net::SocketAddr;

use super::{Way, error, said};
use crate::doctor::evidence::{Listener, Outcome, Place, Process};
use crate::doctor::fault::{Diagnosis, Fault, Fix};
use crate::doctor::gather::covers;
use crate::doctor::verdict::edits;

impl Way<'_> {
    /// docker-proxy on the target's port: the service sees docker-proxy's address, whoever the client.
    pub(super) fn docker_proxy(&self) -> Option<Diagnosis> {
        if !self.is_local() {
            return None;
        }
        let address = self.address();
        let (listener, process) = self.target.listeners.iter().find_map(|listener| {
            let process = listener.process.as_ref()?;
            (covers(listener.address, address) && process.name == "docker-proxy")
                .then_some((listener, process))
        })?;
        let container = container(process);
        let verdict = match container {
            Some(container) => format!(
                "docker-proxy listens on {}: the service would see its address; the container is {container}",
                listener.address
            ),
            None => format!(
                "docker-proxy listens on {}: the service would see its address",
                listener.address
            ),
        };
        let fix = match container {
            Some(container) if container.is_ipv4() == address.is_ipv4() => {
                Fix::run(edits::set_target(self.evidence, self.instance, container))
            }
            _ => {
                Fix::advise("write the container's own address (docker inspect) into instances.tsv")
            }
        };
        let seen = vec![format!(
            "pid {}: {}",
            process.pid,
            process.arguments.join(" ")
        )];
        Some(self.diagnosis(Fault::DockerProxy, verdict, seen, fix))
    }

    /// Whether the service is there.
    pub(super) fn service(&self) -> Option<Diagnosis> {
        let address = self.address();
        let protocol = &self.instance.protocol;
        match &self.target.plain {
            Outcome::Refused => Some(self.elsewhere().unwrap_or_else(|| {
                self.diagnosis(
                    Fault::ServiceDown,
                    format!("nobody listens at {protocol} {address}"),
                    vec![format!("from this host: {}", said(&self.target.plain))],
                    Fix::advise("start the service, or correct the target"),
                )
            })),
            Outcome::Failed(libc::EADDRNOTAVAIL) => self.ports(),
            Outcome::Failed(errno) if self.target.place == Place::Nowhere => Some(self.diagnosis(
                Fault::TargetSilent,
                format!("no route leads to {address}: {}", error(*errno)),
                Vec::new(),
                Fix::advise("bring up the interface that leads there, or correct the target"),
            )),
            // some ways are open to marked packets only
            Outcome::Silent | Outcome::Failed(_)
                if !self.is_udp() && !matches!(self.target.spoofed, Outcome::Open(_)) =>
            {
                Some(self.silent())
            }
            _ => None,
        }
    }

    /// The service is on the port, and at another address of this host.
    fn elsewhere(&self) -> Option<Diagnosis> {
        let address = self.address();
        let mut listeners = self.target.listeners.iter();
        let other = listeners.find(|one| {
            self.is_local()
                && one.address.is_ipv4() == address.is_ipv4()
                && !covers(one.address, address)
        })?;
        let process = match &other.process {
            Some(process) => format!("{}, pid {}", process.name, process.pid),
            None => "a process that cannot be seen".to_owned(),
        };
        let bound = other.address;
        Some(
            self.diagnosis(
                Fault::ServiceElsewhere,
                format!("the service listens at {bound}, not at {address}"),
                vec![process],
                Fix::run(edits::set_target(self.evidence, self.instance, bound))
                    .knowing("or have the service listen there, too"),
            ),
        )
    }

    fn ports(&self) -> Option<Diagnosis> {
        let ports = self.evidence.host.ports?;
        let (from, to) = ports.range;
        let wider = (from.min(10_000), 60_999.max(to));
        let mut fix = Fix::run([format!(
            "sysctl -w net.ipv4.ip_local_port_range='{} {}'",
            wider.0, wider.1
        )]);
        if self.instance.keeps_ports {
            fix = fix.knowing(
                "instances with port=any, and kernels from 6.3 on, leave the host its ports",
            );
        }
        Some(
            self.diagnosis(
                Fault::PortsExhausted,
                "this host cannot connect any more: sockets with clients' addresses hold its ports"
                    .to_owned(),
                vec![format!(
                    "of ports {from} to {to}, {} are taken, {} by spoofed sockets",
                    ports.taken, ports.spoofed
                )],
                fix,
            ),
        )
    }

    /// Not even this host gets an answer.
    fn silent(&self) -> Diagnosis {
        if let Some(found) = self.dropped().or_else(|| self.reverse_path()) {
            return found;
        }
        self.diagnosis(
            Fault::TargetSilent,
            format!(
                "{} does not answer, not even this host: {}",
                self.address(),
                said(&self.target.plain)
            ),
            self.seen(),
            Fix::advise("look at the target: is it up, does its own firewall drop"),
        )
    }

    /// A wildcard UDP service answers from the address that the kernel picks.
    pub(super) fn wildcard(&self) -> Option<Diagnosis> {
        let address = self.address();
        if !self.is_udp() || !self.is_local() {
            return None;
        }
        let bound = |one: &&Listener| covers(one.address, address);
        let listeners = || self.target.listeners.iter().filter(bound);
        let exact = listeners().any(|one| one.address.ip().to_canonical() == address.ip());
        let wildcard = listeners().next().filter(|_| !exact)?;
        let chosen = self.target.chosen.source;
        if chosen == Some(address.ip()) {
            return None;
        }
        let verdict = match chosen {
            Some(chosen) => format!(
                "the UDP service at {address} is bound to {}: it answers from {chosen}, and the answer goes to the real client",
                wildcard.address
            ),
            None => format!(
                "the UDP service at {address} is bound to {}: it has no address to answer from",
                wildcard.address
            ),
        };
        let fix = match chosen {
            Some(chosen) => {
                let target = SocketAddr::new(chosen, address.port());
                Fix::run(edits::set_target(self.evidence, self.instance, target))
                    .knowing(format!("or bind the service to {address}"))
            }
            None => Fix::advise(format!("bind the service to {address}")),
        };
        let seen = vec![format!(
            "a packet to {} without source: {}",
            self.target.client, self.target.chosen
        )];
        let mut found = self.diagnosis(Fault::WildcardUdp, verdict, seen, fix);
        let process = wildcard.process.as_ref();
        found
            .evidence
            .extend(process.map(|one| format!("{}, pid {}", one.name, one.pid)));
        Some(found)
    }
}

/// `-container-ip 172.17.0.2 -container-port 80` of docker-proxy's command line.
fn container(process: &Process) -> Option<SocketAddr> {
    let value = |name: &str| {
        let mut words = process.arguments.iter();
        words.find(|word| word.trim_start_matches('-') == name)?;
        words.next()
    };
    Some(SocketAddr::new(
        value("container-ip")?.parse().ok()?,
        value("container-port")?.parse().ok()?,
    ))
}
