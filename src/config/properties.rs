//! What no input may do, and what is read as it was written.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::diagnostics::Diagnostics;
use super::source::Source;
use super::{INSTANCES, allow, instances, pathways, read_instances};
use crate::model::{InstanceOptions, ListenMode, PortPolicy, Protocol, UdpHeader};

/// Text that is nearly a configuration: pieces that parsers look at, in any order.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let pieces: Vec<&'static [u8]> = vec![
        b"\t",
        b"\t",
        b"\t",
        b"\n",
        b"\r\n",
        b"\r",
        b" ",
        b"#",
        b"=",
        b",",
        b"-",
        b"1",
        b"123",
        b"0x7b",
        b"::1",
        b"[::1]",
        b"127.0.0.1",
        b"192.0.2.1:22",
        b"10.0.0.0/8",
        b"0.0.0.0/0",
        b"port=any",
        b"protocol=udp",
        b"allow=x",
        b"table=",
        b"targets=",
        b"mask=0xff",
        b"name",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\0",
        b"\xc2\xa0",
        b"\xc3\xa4",
        b"\"",
        b"5s",
    ];
    prop::collection::vec(prop::sample::select(pieces), 0..60).prop_map(|pieces| pieces.concat())
}

/// Lines with columns in the right order, each right or not.
fn nearly_instances() -> impl Strategy<Value = Vec<u8>> {
    let column = |values: Vec<&'static str>| prop::sample::select(values);
    let line = (
        column(vec!["a", "b", "", "-", "ä"]),
        column(vec!["1", "2", "0", " 1 "]),
        column(vec!["192.0.2.1:22", ":22", "[::1]:22", "127.0.0.1:22", "x"]),
        column(vec!["127.0.0.1", "-", "10.0.0.5", "::1", ""]),
        column(vec!["22", "23", "0"]),
        column(vec!["::1", "-", "[fd00::5]", "\u{a0}"]),
        column(vec![
            "",
            "\tport=any",
            "\tlisten=transparent",
            "\tprotocol=udp",
            "\t# x",
            " # x",
            "\tallow=x,",
            "\t\t\t",
        ]),
    );
    prop::collection::vec(line, 0..6).prop_map(|lines| {
        let lines: Vec<String> = lines
            .into_iter()
            .map(|(name, mark, listen, v4, port, v6, rest)| {
                format!("{name}\t{mark}\t{listen}\t{v4}\t{port}\t{v6}{rest}")
            })
            .collect();
        lines.join("\n").into_bytes()
    })
}

/// Runs all three parsers. What is not complained about must be a complete value.
fn parse_all(bytes: &[u8]) {
    let source = Source::new(Path::new("file"), bytes);
    let mut found = Diagnostics::default();
    let pathways = pathways::parse(&source, &mut found);
    let complete = pathways.iter().all(|line| line.pathway().is_some());
    assert!(complete || found.errors() > 0);

    let mut of_instances = Diagnostics::default();
    let instances = read_instances(&source, Some((&source, &pathways)), &mut of_instances);
    let complete = instances.iter().all(|line| line.instance.is_some());
    assert!(complete || of_instances.errors() > 0);

    let mut of_allow = Diagnostics::default();
    let list = allow::parse(&source, &mut of_allow);
    assert_eq!(list.is_some(), of_allow.errors() == 0);

    for found in [found, of_instances, of_allow] {
        let found = found.sorted();
        let text = found.draw(true) + &found.to_string();
        assert_eq!(text.is_empty(), found.is_empty());
        serde_json::to_string(&found).unwrap();
    }
}

fn options() -> impl Strategy<Value = InstanceOptions> {
    let duration = || (1u64..=365 * 24 * 60 * 60 * 1000).prop_map(std::time::Duration::from_millis);
    let count = |most: u32| prop::option::of((1..=most).prop_map(|n| n.try_into().unwrap()));
    (
        prop::bool::ANY,
        prop::sample::select(vec![UdpHeader::Every, UdpHeader::First, UdpHeader::Spp]),
        prop::option::of(duration()),
        duration(),
        duration(),
        prop::option::of("[a-z]{1,8}\\.txt".prop_map(PathBuf::from)),
        count(1024),
        prop::sample::select(vec![PortPolicy::Keep, PortPolicy::Any]),
        (count(u32::MAX), count(u32::MAX), count(u32::MAX)),
        prop::sample::select(vec![ListenMode::Own, ListenMode::Transparent]),
    )
        .prop_map(
            |(udp, udp_header, idle, header, connect, allow, listeners, port, limits, listen)| {
                let (max_connections, max_flows, max_flows_per_proxy) = limits;
                let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
                let default = InstanceOptions::defaults(protocol);
                let all_flows = max_flows.unwrap_or(InstanceOptions::DEFAULT_MAX_FLOWS);
                InstanceOptions {
                    protocol,
                    udp_header: if udp { udp_header } else { default.udp_header },
                    idle_timeout: idle.or(default.idle_timeout),
                    header_timeout: if udp { default.header_timeout } else { header },
                    connect_timeout: if udp {
                        default.connect_timeout
                    } else {
                        connect
                    },
                    allow,
                    listeners,
                    listen,
                    port,
                    max_connections: max_connections.filter(|_| !udp),
                    max_flows: max_flows.filter(|_| udp),
                    max_flows_per_proxy: max_flows_per_proxy
                        .filter(|_| udp)
                        .map(|of_one| of_one.min(all_flows)),
                    socket_mode: None,
                    socket_owner: None,
                    resolve: None,
                    destinations: None,
                }
            },
        )
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        parse_all(&bytes);
    }

    #[test]
    fn no_pieces_make_a_parser_panic(bytes in nearly()) {
        parse_all(&bytes);
    }

    #[test]
    fn no_lines_make_a_parser_panic(bytes in nearly_instances()) {
        parse_all(&bytes);
    }

    #[test]
    fn cells_are_where_the_line_has_them(bytes in nearly()) {
        let source = Source::new(Path::new("file"), &bytes);
        let mut found = Diagnostics::default();
        let read = instances::records(&source, &mut found);
        prop_assert!(found.is_empty());
        let lines: Vec<String> = source
            .text()
            .split('\n')
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect();
        let joined: Vec<String> = read
            .iter()
            .map(|cells| cells.iter().map(|cell| cell.text).collect::<Vec<_>>().join("\t"))
            .collect();
        prop_assert_eq!(joined, lines);
    }

    #[test]
    fn options_are_read_as_they_are_written(options in options()) {
        let text = format!("a\t1\t192.0.2.9:2222\t127.0.0.1\t22\t::1\t{options}\n");
        let source = Source::new(Path::new(INSTANCES), text.as_bytes());
        let mut found = Diagnostics::default();
        let lines = instances::parse(&source, &mut found);
        prop_assert_eq!(found.errors(), 0, "{}", found);
        let read = lines.into_iter().next().and_then(|line| line.instance).unwrap();
        prop_assert_eq!(read.options, options);
    }
}
