//! What UDP instances count beyond connections, which are flows there.

use std::fmt;

use super::Writer;
use crate::relay::udp::counters::{Dropped, Ended};

pub(super) fn write(writer: &mut Writer<'_, '_>) -> fmt::Result {
    writer.datagrams_by(
        "relayed_datagrams",
        "Datagrams handed on",
        "direction",
        |totals| {
            [
                ("to-target", totals.datagrams_to_target),
                ("to-client", totals.datagrams_to_client),
            ]
        },
    )?;
    writer.datagrams_by(
        "dropped_datagrams",
        "Datagrams of allowed proxies that went no further; see connections_refused, too",
        "reason",
        |totals| Dropped::ALL.map(|kind| (kind.name(), totals.dropped.of(kind))),
    )?;
    writer.datagrams_by(
        "receive_buffer_overflows",
        "Datagrams that the kernel dropped because a receive buffer was full",
        "direction",
        |totals| {
            [
                ("to-target", totals.overflow_from_proxy),
                ("to-client", totals.overflow_from_target),
            ]
        },
    )?;
    writer.datagrams_by("flows_ended", "Flows that ended", "reason", |totals| {
        Ended::ALL.map(|kind| (kind.name(), totals.ended.of(kind)))
    })?;
    writer.datagrams_by(
        "flows_special",
        "Flows that ended idle without an answer, that came from another worker, and how often one's answers were lent to another",
        "kind",
        |totals| {
            [
                ("unanswered", totals.flows_unanswered),
                ("adopted", totals.flows_adopted),
                ("lent", totals.flows_lent),
            ]
        },
    )
}
