//! `probe`: being the proxy, well or badly.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::model::parse_duration;

/// `probe`.
#[derive(Debug, Args)]
#[command(after_help = PROBE_EXAMPLES)]
pub struct ProbeArgs {
    /// The relay to connect to
    #[arg(value_name = "ADDR:PORT", value_parser = endpoint)]
    pub relay: SocketAddr,
    /// Whose connection this is said to be
    #[arg(
        long,
        value_name = "ADDR:PORT",
        value_parser = endpoint,
        required_unless_present_any = ["local", "unknown", "unspec", "corrupt"],
    )]
    pub client: Option<SocketAddr>,
    /// Where that client is said to have connected to, in its family [default: the relay, or a
    /// documentation address of the client's family]
    #[arg(long, value_name = "ADDR:PORT", value_parser = endpoint, conflicts_with = "nobody")]
    pub destination: Option<SocketAddr>,
    /// The header's form: 1 is a line of text, 2 is binary, spp is Simple Proxy Protocol (UDP) [default: 2]
    #[arg(long, value_name = "1|2|spp", hide_possible_values = true)]
    pub version: Option<HeaderForm>,
    /// Over UDP: stdin is one datagram, with the header in front
    #[arg(long)]
    pub udp: bool,
    /// The header on the first datagram only, as Spectrum and Traefik send it; alone if stdin is empty
    #[arg(long, requires = "udp")]
    pub first: bool,
    /// Each line of stdin is a datagram, without its line end; so is each answer on stdout
    #[arg(long, requires = "udp")]
    pub lines: bool,
    /// Send LOCAL, as a health check of the proxy's own does (version 2)
    #[arg(long, group = "nobody", conflicts_with = "client")]
    pub local: bool,
    /// Send UNKNOWN: no client is named (version 1)
    #[arg(long, group = "nobody", conflicts_with = "client")]
    pub unknown: bool,
    /// Send PROXY with family UNSPEC: no client is named (version 2)
    #[arg(long, group = "nobody", conflicts_with = "client")]
    pub unspec: bool,
    /// Append a TLV: a type and its value in hexadecimal (0xee=00ff), or a name and a text
    /// (alpn=h2, authority=example.org, unique-id=42, netns=blue); may be repeated (version 2)
    #[arg(long, value_name = "TYPE=VALUE")]
    pub tlv: Vec<String>,
    /// Append a CRC32C of the header (version 2)
    #[arg(long)]
    pub crc32c: bool,
    /// Send the header in so many pieces, each a segment of its own
    #[arg(
        long,
        value_name = "PIECES",
        default_value = "1",
        conflicts_with = "udp"
    )]
    pub split: std::num::NonZeroUsize,
    /// The pause between two pieces
    #[arg(long, value_name = "DURATION", default_value = "20ms", value_parser = parse_duration, conflicts_with = "udp")]
    pub split_delay: Duration,
    /// Spoil the header, to see that it is refused
    #[arg(long, value_name = "HOW")]
    pub corrupt: Option<Corruption>,
    /// Connect from this address of this host
    #[arg(long, value_name = "ADDR")]
    pub source: Option<IpAddr>,
    /// How long to wait for the connection, and for an answer once stdin has ended
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub timeout: Duration,
}

const PROBE_EXAMPLES: &str = "\
Examples:
  mmproxyctl probe 100.64.0.1:2222 --client 192.0.2.7:40000 </dev/null
      sshd's banner, with 192.0.2.7 in its log
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | mmproxyctl probe [fd00::1]:8080 --client [2001:db8::7]:40000 --version 1
      the page, asked for by 2001:db8::7
  echo hello | mmproxyctl probe 100.64.0.1:7 --client 192.0.2.7:40000 --udp --lines
      the answer to one datagram

Exit code 0 when the other end answered or closed in order, 1 when it refused, reset or kept silent.";

/// The form of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HeaderForm {
    /// PROXY, a line of text
    #[value(name = "1")]
    V1,
    /// PROXY, binary
    #[value(name = "2")]
    V2,
    /// Simple Proxy Protocol
    Spp,
}

/// What `probe --corrupt` does to a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Corruption {
    /// No header at all: stdin comes first
    Missing,
    /// The header's first half and then the end
    Truncated,
    /// Another signature
    BadSignature,
    /// A family that does not exist
    BadFamily,
    /// A length that no receiver takes
    OversizedLength,
    /// An IPv4 address with 256 in it (version 1)
    BadAddress,
    /// Port 65536 (version 1)
    BadPort,
    /// LF alone at the line's end (version 1)
    BadEnd,
    /// Version 3 (version 2)
    BadVersion,
    /// Command 15 (version 2)
    BadCommand,
    /// A length that is too small for the addresses (version 2)
    ShortLength,
    /// A TLV that is cut off (version 2)
    TruncatedTlv,
    /// A CRC32C with a changed bit (version 2)
    BadCrc,
}

/// An address and a port, as a header may name them: any port, also 0.
fn endpoint(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(
        |_| "expected an address and a port such as 192.0.2.7:40000 or [2001:db8::7]:40000",
    )
}
