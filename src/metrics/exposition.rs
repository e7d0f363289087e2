//! A process written down as OpenMetrics text.
//!
//! Owns: names, units and labels, after the conventions of Prometheus: base units, `_total` for counters,
//! one name for one thing with the kinds as a label. Every kind is there from the first scrape on, at 0:
//! `rate()` sees the first one only if it saw the 0 before.

mod datagrams;

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, LabelSetEncoder, MetricEncoder,
    NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use crate::overview::{InstanceReport, PathwayReport, PathwayState, Process, State};
use crate::pathway::watch::Kind;
use crate::relay::counters::{ConnectFailure, Refusal, Totals};
use crate::relay::histogram::{BOUNDS, Distribution};
use crate::relay::udp::counters as udp;

/// Writes a process down.
pub(super) fn write(process: Process) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("mmproxy");
    registry.register_collector(Box::new(Snapshot(process)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshot(Process);

/// Labels whose values are only borrowed.
#[derive(Debug)]
struct Labels<'a, const N: usize>([(&'a str, &'a str); N]);

impl<const N: usize> EncodeLabelSet for Labels<'_, N> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.encode(encoder)
    }
}

/// One metric of one kind, its samples written one by one.
struct Family<'e>(MetricEncoder<'e>);

impl Family<'_> {
    fn counter<const N: usize>(&mut self, labels: [(&str, &str); N], value: u64) -> fmt::Result {
        let labels = Labels(labels);
        let mut sample = self.0.encode_family(&labels)?;
        sample.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge<const N: usize>(
        &mut self,
        labels: [(&str, &str); N],
        value: impl EncodeGaugeValue,
    ) -> fmt::Result {
        self.0.encode_family(&Labels(labels))?.encode_gauge(&value)
    }
}

/// Writes families one after the other.
struct Writer<'e, 'p> {
    encoder: DescriptorEncoder<'e>,
    instances: &'p [InstanceReport],
}

impl Writer<'_, '_> {
    fn family(
        &mut self,
        (name, help): (&str, &str),
        unit: Option<&Unit>,
        kind: MetricType,
        samples: impl FnOnce(&mut Family<'_>, &[InstanceReport]) -> fmt::Result,
    ) -> fmt::Result {
        let encoder = self.encoder.encode_descriptor(name, help, unit, kind)?;
        samples(&mut Family(encoder), self.instances)
    }

    /// A counter with no label but the instance.
    fn counter(&mut self, name: &str, help: &str, value: fn(&Totals) -> u64) -> fmt::Result {
        self.family((name, help), None, MetricType::Counter, |family, all| {
            all.iter()
                .try_for_each(|one| family.counter([("instance", &one.name)], value(&one.totals)))
        })
    }

    /// A counter by instance and one more label.
    fn counter_by<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Fn(&Totals) -> [(&'static str, u64); N],
    ) -> fmt::Result {
        self.family((name, help), None, MetricType::Counter, |family, all| {
            for one in all {
                for (kind, value) in values(&one.totals) {
                    family.counter([("instance", &one.name), (label, kind)], value)?;
                }
            }
            Ok(())
        })
    }

    /// A counter of UDP instances by instance and one more label.
    fn datagrams_by<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Fn(&udp::Totals) -> [(&'static str, u64); N],
    ) -> fmt::Result {
        self.family((name, help), None, MetricType::Counter, |family, all| {
            for one in all {
                let counted = one.datagrams.as_ref().map(&values);
                for (kind, value) in counted.into_iter().flatten() {
                    family.counter([("instance", &one.name), (label, kind)], value)?;
                }
            }
            Ok(())
        })
    }

    fn gauge(&mut self, name: &str, help: &str, value: fn(&Totals) -> u64) -> fmt::Result {
        self.family((name, help), None, MetricType::Gauge, |family, all| {
            all.iter()
                .try_for_each(|one| family.gauge([("instance", &one.name)], value(&one.totals)))
        })
    }

    fn seconds(&mut self, name: &str, help: &str, of: fn(&Totals) -> &Distribution) -> fmt::Result {
        let (unit, kind) = (Unit::Seconds, MetricType::Histogram);
        self.family((name, help), Some(&unit), kind, |family, all| {
            for one in all {
                let distribution = of(&one.totals);
                let bounds = BOUNDS.iter().map(Duration::as_secs_f64);
                let buckets: Vec<_> = bounds
                    .chain([f64::INFINITY])
                    .zip(distribution.counts)
                    .collect();
                let sum = distribution.sum_ns as f64 / 1e9;
                let labels = Labels([("instance", &one.name)]);
                family.0.encode_family(&labels)?.encode_histogram(
                    sum,
                    distribution.count(),
                    &buckets,
                    None::<&HashMap<usize, Exemplar<NoLabelSet, f64>>>,
                )?;
            }
            Ok(())
        })
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(process) = self;
        let mut writer = Writer {
            encoder,
            instances: &process.instances,
        };
        of_process(&mut writer, process)?;
        of_instances(&mut writer)?;
        of_pathways(&mut writer)?;
        of_connections(&mut writer)?;
        datagrams::write(&mut writer)
    }
}

fn of_process(writer: &mut Writer<'_, '_>, process: &Process) -> fmt::Result {
    let build = ("build", "The program that runs");
    writer.family(build, None, MetricType::Info, |family, _| {
        let labels = [("version", process.version.as_str())];
        family.0.encode_info(&Labels(labels))
    })?;
    let start = ("start_time", "When the process started, since the epoch");
    let unit = Unit::Seconds;
    writer.family(start, Some(&unit), MetricType::Gauge, |family, _| {
        family.0.encode_gauge(&process.started)
    })
}

fn of_instances(writer: &mut Writer<'_, '_>) -> fmt::Result {
    let info = ("instance", "An instance as configured");
    writer.family(info, None, MetricType::Info, |family, all| {
        for one in all {
            let mark = one.pathway.mark.to_string();
            let targets = one.targets.join(",");
            let labels = Labels([
                ("instance", one.name.as_str()),
                ("listen", &one.listen),
                ("mark", &mark),
                ("protocol", &one.protocol),
                ("target", &targets),
            ]);
            family.0.encode_info(&labels)?;
        }
        Ok(())
    })?;
    let state = (
        "instance_state",
        "1 for the state that the instance is in, 0 for the others",
    );
    writer.family(state, None, MetricType::Gauge, |family, all| {
        for one in all {
            for state in State::ALL {
                let labels = [("instance", one.name.as_str()), ("state", state.name())];
                family.gauge(labels, u64::from(one.standing.state == state))?;
            }
        }
        Ok(())
    })?;
    let failures = (
        "instance_failures",
        "Times that the instance failed and was started again",
    );
    writer.family(failures, None, MetricType::Counter, |family, all| {
        all.iter()
            .try_for_each(|one| family.counter([("instance", &one.name)], one.standing.failures))
    })
}

/// Each pathway once, however many instances use it. One that could not be looked at has no sample.
fn of_pathways(writer: &mut Writer<'_, '_>) -> fmt::Result {
    let mut pathways: Vec<&PathwayReport> = writer
        .instances
        .iter()
        .map(|one| &one.pathway)
        .filter(|pathway| {
            !matches!(
                pathway.state,
                PathwayState::Unknown | PathwayState::Unmarked
            )
        })
        .collect();
    pathways.sort_unstable_by_key(|pathway| pathway.mark);
    pathways.dedup_by_key(|pathway| pathway.mark);
    let mut gauge = |about, value: fn(&PathwayReport) -> u64| {
        writer.family(about, None, MetricType::Gauge, |family, _| {
            pathways.iter().try_for_each(|pathway| {
                let mark = pathway.mark.to_string();
                let name = pathway.name.as_deref().unwrap_or_default();
                family.gauge([("mark", &mark), ("pathway", name)], value(pathway))
            })
        })
    };
    gauge(
        (
            "pathway_in_place",
            "1 while every rule, route and firewall rule of the pathway is there",
        ),
        |pathway| u64::from(pathway.state == PathwayState::InPlace),
    )?;
    gauge(
        (
            "pathway_missing_pieces",
            "Pieces of the pathway that are missing",
        ),
        |pathway| pathway.findings.len() as u64,
    )?;
    let about = (
        "pathway_repairs",
        "Pieces of the pathway that something removed and that were put back",
    );
    writer.family(about, None, MetricType::Counter, |family, _| {
        for pathway in pathways {
            let Some(repairs) = pathway.repairs else {
                continue;
            };
            let mark = pathway.mark.to_string();
            let name = pathway.name.as_deref().unwrap_or_default();
            for kind in Kind::ALL {
                let labels = [
                    ("mark", mark.as_str()),
                    ("pathway", name),
                    ("kind", kind.name()),
                ];
                family.counter(labels, repairs.of(kind))?;
            }
        }
        Ok(())
    })
}

fn of_connections(writer: &mut Writer<'_, '_>) -> fmt::Result {
    writer.gauge(
        "connections_active",
        "Connections open now, in whatever state",
        |totals| totals.active,
    )?;
    writer.gauge(
        "connections_waiting",
        "Connections open now without a complete PROXY header",
        |totals| totals.waiting,
    )?;
    writer.counter("connections_accepted", "Connections accepted", |totals| {
        totals.accepted
    })?;
    let ports = (
        "port_connections",
        "Of an instance with a range of ports: connections accepted, or flows begun, at each to which any came",
    );
    writer.family(ports, None, MetricType::Counter, |family, all| {
        for one in all {
            for port in &one.ports {
                let number = port.port.to_string();
                let labels = [("instance", one.name.as_str()), ("port", &number)];
                family.counter(labels, port.accepted)?;
            }
        }
        Ok(())
    })?;
    writer.counter(
        "connections_relayed",
        "Connections that reached the service",
        |totals| totals.relayed,
    )?;
    writer.counter(
        "connections_empty",
        "Connections that the proxy closed without a byte: health checks",
        |totals| totals.empty,
    )?;
    writer.counter_by(
        "connections_refused",
        "Connections closed without a word to the service",
        "reason",
        |totals| Refusal::ALL.map(|kind| (kind.name(), totals.refused.of(kind))),
    )?;
    writer.counter_by(
        "connect_failures",
        "Connections whose service was not reached",
        "reason",
        |totals| ConnectFailure::ALL.map(|kind| (kind.name(), totals.connect_failed.of(kind))),
    )?;
    writer.counter_by(
        "connections_aborted",
        "Relayed connections that did not end by both sides closing them",
        "reason",
        |totals| {
            [
                ("reset", totals.resets),
                ("idle-timeout", totals.idle_ended),
                ("killed", totals.killed),
            ]
        },
    )?;
    writer.counter_by("relayed_bytes", "Bytes handed on", "direction", |totals| {
        [
            ("to-target", totals.bytes_to_target),
            ("to-client", totals.bytes_to_client),
        ]
    })?;
    writer.counter(
        "spliced_bytes",
        "Of all bytes, those that never entered user space",
        |totals| totals.bytes_spliced,
    )?;
    writer.counter(
        "ports_given_up",
        "Connections whose client port was taken: another was used, the address kept",
        |totals| totals.ports_given_up,
    )?;
    writer.counter(
        "accept_pauses",
        "Times that accepting paused because descriptors ran out",
        |totals| totals.accept_pauses,
    )?;
    writer.seconds(
        "header_wait",
        "From accepting a connection to its complete PROXY header",
        |totals| &totals.header_wait,
    )?;
    writer.seconds(
        "connect",
        "From the spoofed connect to the service's answer",
        |totals| &totals.connect_time,
    )
}
