//! Log lines for systemd's journal, in its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): the line as a person reads it, and every field by itself.
//!
//! Field names are those of the text form in the journal's spelling: `client.addr` is `CLIENT_ADDR`, and
//! for addresses there is one without the port besides, to search by: `journalctl CLIENT=203.0.113.7`.
//!
//! `tracing-journald` sends the bare message as the line: who reads `journalctl -u mmproxy` would learn
//! that a connection was refused, but not whose.

use std::fmt::{self, Write as _};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// How long a line may wait for a journal that is busy: relaying goes before logging.
const PATIENCE: Duration = Duration::from_millis(100);

/// Whether stderr is the journal's own stream, as systemd says in `$JOURNAL_STREAM` (device and inode).
pub(super) fn has_stderr() -> bool {
    let Some(said) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    // the variable is inherited by whatever is started with another stderr
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| said == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Sends every line to the journal.
pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// Connects to the journal.
    ///
    /// # Errors
    /// When there is none on this host.
    pub(super) fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(SOCKET)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }
}

/// Names and values, in their order; the message by itself.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.keep(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.keep(field, value.to_owned());
    }
}

impl Fields {
    fn keep(&mut self, field: &Field, value: String) {
        match field.name() {
            "message" => self.message = value,
            // made by tracing-log for lines of the log crate; said by MODULE
            name if name.starts_with("log.") => {}
            name => self.others.push((name, value)),
        }
    }
}

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        let mut line = String::new();
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(of) = span.extensions().get::<Fields>() {
                for (name, value) in &of.others {
                    // the instance is what every line is about
                    let _ = write!(line, "{value}: ");
                    fields.others.push((name, value.clone()));
                }
            }
        }
        let own = fields.others.len();
        event.record(&mut fields);
        line.push_str(&fields.message);
        for (name, value) in &fields.others[own..] {
            let _ = write!(line, " {name}={value}");
        }
        let packet = packet(event.metadata(), &line, &fields.others);
        if self.0.send(&packet).is_err() {
            // the journal restarts, or the line is above the socket's buffer
            eprintln!("{line}");
        }
    }
}

fn packet(metadata: &Metadata<'_>, line: &str, fields: &[(&str, String)]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(512);
    // syslog's: err, warning, info, debug
    let priority = match *metadata.level() {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    };
    put(&mut packet, "MESSAGE", line);
    put(&mut packet, "PRIORITY", priority);
    put(&mut packet, "SYSLOG_IDENTIFIER", env!("CARGO_PKG_NAME"));
    put(&mut packet, "MODULE", metadata.target());
    for (name, value) in fields {
        put(&mut packet, &spelled(name), value);
        if let Some(role) = name.strip_suffix(".addr")
            && let Ok(addr) = value.parse::<SocketAddr>()
        {
            put(&mut packet, &spelled(role), &addr.ip().to_string());
        }
    }
    packet
}

/// A field's name as the journal takes it: capitals, digits and underscores.
fn spelled(name: &str) -> String {
    let spelled = name.trim_start_matches("r#").chars().map(|c| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    });
    spelled.collect()
}

fn put(packet: &mut Vec<u8>, name: &str, value: &str) {
    packet.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        packet.push(b'\n');
        packet.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        packet.push(b'=');
    }
    packet.extend_from_slice(value.as_bytes());
    packet.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_line_feeds_carry_their_length() {
        let mut packet = Vec::new();
        put(&mut packet, "A", "x=y");
        put(&mut packet, "B", "1\nMESSAGE=forged");
        assert_eq!(packet, b"A=x=y\nB\n\x10\0\0\0\0\0\0\x001\nMESSAGE=forged\n");
    }

    #[test]
    fn names_are_spelled_as_the_journal_takes_them() {
        assert_eq!(spelled("client.addr"), "CLIENT_ADDR");
        assert_eq!(spelled("bytes.in"), "BYTES_IN");
    }
}
