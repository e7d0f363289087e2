//! Command lines as people have them in units and scripts, and what each means.

use super::*;

/// What a relay has that is not the default, in one line.
fn told(relay: &Relay) -> String {
    let default = match parse(OldName::GoMmproxy, &[]).unwrap() {
        Invocation::Relay(relay) => *relay,
        other => panic!("{other:?}"),
    };
    let mut words = Vec::new();
    let mut say = |differs: bool, word: String| {
        if differs {
            words.push(word);
        }
    };
    say(
        relay.listen != default.listen,
        format!("l={}", relay.listen),
    );
    say(
        relay.target4 != default.target4,
        format!("4={}", relay.target4),
    );
    say(
        relay.target6 != default.target6,
        format!("6={}", relay.target6),
    );
    say(
        relay.protocol != default.protocol,
        relay.protocol.to_string(),
    );
    if let Some(mark) = relay.mark {
        say(true, format!("mark={mark}"));
    }
    say(
        relay.listeners != default.listeners,
        format!("listeners={}", relay.listeners),
    );
    say(
        relay.close_after != default.close_after,
        format!("close={}", relay.close_after.as_secs()),
    );
    if let Some(file) = &relay.allow {
        say(true, format!("allow={}", file.display()));
    }
    say(relay.verbosity != 0, format!("v={}", relay.verbosity));
    say(relay.port != default.port, format!("port={}", relay.port));
    say(
        relay.destination == Destination::Header,
        "header".to_owned(),
    );
    say(
        relay.listening == Listening::Transparent,
        "transparent".to_owned(),
    );
    if let Some(table) = relay.suggest {
        say(true, format!("suggest={table}"));
    }
    say(
        !relay.notes.is_empty(),
        format!("notes={}", relay.notes.len()),
    );
    words.join(" ")
}

fn meant(line: &str) -> String {
    let mut words = shlex::split(line).expect("a line that a shell can split");
    let name = OldName::of(words.remove(0).as_ref()).expect("an old name");
    match parse(name, &words) {
        Ok(Invocation::Relay(relay)) => told(&relay),
        Ok(Invocation::Json(file)) => format!("json {}", file.display()),
        Ok(Invocation::Help) => "help".to_owned(),
        Ok(Invocation::Version) => "version".to_owned(),
        Err(error) => format!("error: {error}"),
    }
}

/// Everything of cloudflare's that has to be there, and what it means.
const CF: &str = "-l 0.0.0.0:2222 -4 127.0.0.1:22 -6 [::1]:22 --allowed-networks nets";
const CF_MEANS: &str = "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=123 allow=nets";

const LINES: &[(&str, &str)] = &[
    // nothing, and every flag of go-mmproxy in every spelling Go takes
    ("go-mmproxy", ""),
    ("mmproxy", ""),
    (
        "/usr/bin/go-mmproxy -l 0.0.0.0:8443 -4 127.0.0.1:443 -6 [::1]:443 -p tcp -listeners 1 -close-after 60 -v 0 -mark 0",
        "",
    ),
    ("go-mmproxy -l 10.0.0.1:2222", "l=10.0.0.1:2222"),
    ("go-mmproxy --l 10.0.0.1:2222", "l=10.0.0.1:2222"),
    ("go-mmproxy -l=10.0.0.1:2222", "l=10.0.0.1:2222"),
    ("go-mmproxy --l=10.0.0.1:2222", "l=10.0.0.1:2222"),
    ("go-mmproxy -l [fd00::1]:2222", "l=[fd00::1]:2222"),
    ("go-mmproxy -l :9000", "l=0.0.0.0:9000"),
    ("go-mmproxy -l [::]:9000", "l=[::]:9000"),
    ("go-mmproxy -l one:1 -l two:2", "l=two:2"),
    (
        "go-mmproxy -4 127.0.0.1:22 -6 [::1]:22",
        "4=127.0.0.1:22 6=[::1]:22",
    ),
    ("go-mmproxy -4=10.5.5.2:9000", "4=10.5.5.2:9000"),
    ("go-mmproxy -4 localhost:25578", "4=localhost:25578"),
    ("go-mmproxy -p udp", "udp"),
    ("go-mmproxy -p=tcp", ""),
    ("go-mmproxy -p UDP", "udp"),
    ("go-mmproxy -mark 123", "mark=123"),
    ("go-mmproxy -mark 0x7b", "mark=123"),
    ("go-mmproxy -mark 0173", "mark=123"),
    ("go-mmproxy -mark=0b1111011", "mark=123"),
    ("go-mmproxy -mark 1_000", "mark=1000"),
    ("go-mmproxy -mark 4294967295", "mark=4294967295"),
    (
        "go-mmproxy -mark 0o173 --listeners=0x4",
        "mark=123 listeners=4",
    ),
    // Go looks no further than the first =, and takes what follows a flag for its value whatever it is
    ("go-mmproxy -allowed-subnets=a=b", "allow=a=b"),
    ("go-mmproxy -allowed-subnets -l", "allow=-l"),
    ("go-mmproxy -allowed-subnets=", ""),
    ("go-mmproxy -listeners 4", "listeners=4"),
    ("go-mmproxy -close-after 5", "close=5"),
    ("go-mmproxy -close-after 0", "close=1 notes=1"),
    (
        "go-mmproxy -allowed-subnets /etc/nets.txt",
        "allow=/etc/nets.txt",
    ),
    (
        "go-mmproxy --allowed-subnets='/etc/my nets'",
        "allow=/etc/my nets",
    ),
    ("go-mmproxy -allowed-subnets ''", ""),
    ("go-mmproxy -v 1", "v=1"),
    ("go-mmproxy -v=2", "v=2"),
    ("go-mmproxy -v 7", "v=2"),
    ("go-mmproxy -dynamic-destination", "header"),
    (
        "go-mmproxy -dynamic-destination=true -listen-transparent=1",
        "header transparent",
    ),
    ("go-mmproxy -dynamic-destination=F", ""),
    ("go-mmproxy --listen-transparent", "transparent"),
    ("go-mmproxy -mark 5 --", "mark=5"),
    ("go-mmproxy -h", "help"),
    ("go-mmproxy -help", "help"),
    ("go-mmproxy --help -l nonsense", "help"),
    ("go-mmproxy -version", "version"),
    // their READMEs, their units, and what is built on them
    (
        "./go-mmproxy -l 0.0.0.0:25577 -4 127.0.0.1:25578 -6 [::1]:25578 --allowed-subnets ./path-prefixes.txt",
        "l=0.0.0.0:25577 4=127.0.0.1:25578 6=[::1]:25578 allow=./path-prefixes.txt",
    ),
    (
        "/usr/bin/go-mmproxy -4 127.0.0.1:1000 -6 \"[::1]:1000\" -allowed-subnets /usr/share/path-prefixes.txt -l 0.0.0.0:1234",
        "l=0.0.0.0:1234 4=127.0.0.1:1000 6=[::1]:1000 allow=/usr/share/path-prefixes.txt",
    ),
    (
        "go-mmproxy -l 0.0.0.0:25577 -4 127.0.0.1:25578 -6 [::1]:25578 -listen-transparent",
        "l=0.0.0.0:25577 4=127.0.0.1:25578 6=[::1]:25578 transparent",
    ),
    (
        "./go-mmproxy -l 0.0.0.0:1234 -4 10.5.5.2:9000 -p tcp -v 2 -mark 123",
        "l=0.0.0.0:1234 4=10.5.5.2:9000 mark=123 v=2",
    ),
    (
        "/opt/mmproxy/bin/go-mmproxy -allowed-subnets /opt/mmproxy/config/allow.txt -mark 123 -l 100.101.102.123:2222 -4 127.0.0.1:22 -6 [::1]:22 -v 1",
        "l=100.101.102.123:2222 4=127.0.0.1:22 6=[::1]:22 mark=123 allow=/opt/mmproxy/config/allow.txt v=1",
    ),
    (
        "mmproxy -l 127.0.0.1:25577 -4 127.0.0.1:1122 -p udp -close-after 1",
        "l=127.0.0.1:25577 4=127.0.0.1:1122 udp close=1",
    ),
    // mmproxy-rs
    (
        "mmproxy -m 123 -l 192.0.2.1:8080 -4 127.0.0.1:8081 -p udp",
        "l=192.0.2.1:8080 4=127.0.0.1:8081 udp mark=123",
    ),
    (
        "mmproxy -l 127.0.0.1:25577 -4 127.0.0.1:1122 -p udp -c 1",
        "l=127.0.0.1:25577 4=127.0.0.1:1122 udp close=1",
    ),
    (
        "mmproxy --ipv4 127.0.0.1:1 --ipv6 [::1]:2 --listen-addr 127.0.0.1:3 --protocol udp --mark 4 --close-after 5 --listeners 6 --allowed-subnets s",
        "l=127.0.0.1:3 4=127.0.0.1:1 6=[::1]:2 udp mark=4 listeners=6 close=5 allow=s",
    ),
    ("mmproxy -a subnets.txt", "allow=subnets.txt"),
    // decimal, where Go would read octal or a file's name
    ("mmproxy -m 0123", "mark=123"),
    ("mmproxy -m 08 -c 090 -p udp", "udp mark=8 close=90"),
    (
        "mmproxy --mark 010 --listen-addr 127.0.0.1:3",
        "l=127.0.0.1:3 mark=10",
    ),
    (
        "mmproxy CF -q --mark 010",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=10 allow=nets port=any",
    ),
    (
        "mmproxy -a s -l 127.0.0.1:3 -4 127.0.0.1:1 -6 [::1]:2 -p tcp",
        "l=127.0.0.1:3 4=127.0.0.1:1 6=[::1]:2 allow=s",
    ),
    // Cloudflare's
    (
        "mmproxy --allowed-networks allowed-networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 [::1]:22",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=123 allow=allowed-networks.txt port=any suggest=100",
    ),
    (
        "mmproxy -a networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 '[::1]:22'",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=123 allow=networks.txt notes=1",
    ),
    (
        "mmproxy -a networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 '[::1]:22' -v",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=123 allow=networks.txt v=2 port=any suggest=100",
    ),
    (
        "mmproxy -anetworks.txt",
        "error: unknown flag '-anetworks.txt': mmproxy -h lists them",
    ),
    (
        "mmproxy -a/etc/nets -l0.0.0.0:2222 -4127.0.0.1:22 -6[::1]:22 -m9 -qvP",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 mark=9 allow=/etc/nets v=2",
    ),
    ("mmproxy CF --quiet", "CF port=any"),
    ("mmproxy CF -q --force-real-client-port", "CF"),
    ("mmproxy CF -N", "CF port=any suggest=100"),
    ("mmproxy CF --table 7", "CF port=any suggest=7"),
    ("mmproxy CF -t 7 --verbose", "CF v=2 port=any suggest=7"),
    (
        "mmproxy --listen 0.0.0.0:2222 --target-v4 127.0.0.1:22 --target-v6 [::1]:22 -a nets --quiet",
        "CF port=any",
    ),
    (
        "mmproxy --listen=0.0.0.0:2222 --target-v4=127.0.0.1:22 --target-v6=[::1]:22 -a nets -q",
        "CF port=any",
    ),
    (
        "mmproxy CF -q --mark 0",
        "l=0.0.0.0:2222 4=127.0.0.1:22 6=[::1]:22 allow=nets port=any",
    ),
    (
        "mmproxy -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 [::1]:22 --quiet",
        "error: --allowed-networks is missing: --allowed-networks proxies.txt, as cloudflare/mmproxy demands",
    ),
    (
        "mmproxy --allowed-networks nets -l 0.0.0.0:2222 -4 127.0.0.1:22",
        "error: -6 is missing: -6 [::1]:22, as cloudflare/mmproxy demands",
    ),
    (
        "mmproxy CF --table 254",
        "error: invalid value '254' for -table: expected a table of the pathway's own, not 0 and not 253 to 255",
    ),
    // the JSON file
    ("mmproxy -c /etc/mmproxy.json", "json /etc/mmproxy.json"),
    ("/usr/local/bin/mmproxy -c=config.json", "json config.json"),
    ("go-mmproxy -c ./60", "json ./60"),
    (
        "mmproxy -c f.json -v 1",
        "error: -v beside -c f.json: -c alone: the file says everything",
    ),
    // mistakes
    (
        "go-mmproxy -nope",
        "error: unknown flag '-nope': go-mmproxy -h lists them",
    ),
    (
        "go-mmproxy --allowed-subnet x",
        "error: unknown flag '--allowed-subnet': go-mmproxy -h lists them",
    ),
    (
        "go-mmproxy ---l x",
        "error: '---l' is no flag: one or two dashes, a name, and perhaps = and a value",
    ),
    (
        "go-mmproxy -=x",
        "error: '-=x' is no flag: one or two dashes, a name, and perhaps = and a value",
    ),
    (
        "go-mmproxy -mark",
        "error: -mark has no value: a value behind -mark",
    ),
    (
        "go-mmproxy -mark x",
        "error: invalid value 'x' for -mark: expected a number, 0 or more",
    ),
    (
        "go-mmproxy -mark -1",
        "error: invalid value '-1' for -mark: expected a number, 0 or more",
    ),
    (
        "go-mmproxy -mark 4294967296",
        "error: invalid value '4294967296' for -mark: expected a mark up to 4294967295",
    ),
    (
        "go-mmproxy -mark 08",
        "error: invalid value '08' for -mark: expected a number, 0 or more",
    ),
    (
        "go-mmproxy -p sctp",
        "error: invalid value 'sctp' for -p: expected tcp or udp",
    ),
    (
        "go-mmproxy -listeners 0",
        "error: invalid value '0' for -listeners: expected a number, 1 or more",
    ),
    (
        "go-mmproxy -listeners 2000",
        "error: invalid value '2000' for -listeners: expected a number from 1 to 1024",
    ),
    (
        "go-mmproxy -close-after -5",
        "error: invalid value '-5' for -close-after: expected a number, 0 or more",
    ),
    (
        "go-mmproxy -v -3",
        "error: invalid value '-3' for -v: expected 0, 1 or 2",
    ),
    (
        "go-mmproxy -v loud",
        "error: invalid value 'loud' for -v: expected 0, 1 or 2",
    ),
    (
        "go-mmproxy -dynamic-destination=yes",
        "error: invalid value 'yes' for -dynamic-destination: expected true or false",
    ),
    (
        "go-mmproxy -l 8443",
        "error: -l: '8443' is not an address with a port: an address and a port such as 127.0.0.1:443 or [::1]:443",
    ),
    (
        "go-mmproxy -4 [::1]:443",
        "error: invalid value '[::1]:443' for -4: expected an IPv4 address and a port such as 127.0.0.1:443",
    ),
    (
        "go-mmproxy -6 127.0.0.1:443",
        "error: invalid value '127.0.0.1:443' for -6: expected an IPv6 address and a port such as [::1]:443",
    ),
    (
        "go-mmproxy -4 0.0.0.0:443",
        "error: invalid value '0.0.0.0:443' for -4: expected the service's own address, such as 127.0.0.1:443",
    ),
    (
        "go-mmproxy stray -mark 5",
        "error: unexpected word 'stray': flags only; go-mmproxy ignored it and every flag behind it",
    ),
    (
        "go-mmproxy -mark 5 -- -l",
        "error: unexpected word '-l': flags only; go-mmproxy ignored it and every flag behind it",
    ),
    (
        "go-mmproxy -dynamic-destination true",
        "error: unexpected word 'true': flags only; go-mmproxy ignored it and every flag behind it",
    ),
    (
        "go-mmproxy -",
        "error: unexpected word '-': flags only; go-mmproxy ignored it and every flag behind it",
    ),
];

#[test]
fn command_lines() {
    assert!(LINES.len() >= 80, "{} lines", LINES.len());
    for (line, means) in LINES {
        let (line, means) = (line.replace("CF", CF), means.replace("CF", CF_MEANS));
        assert_eq!(meant(&line), means, "{line}");
    }
}

#[test]
fn words_for_the_pattern_of_start_scripts() {
    let ordered = |line: &str| {
        let words = shlex::split(line).unwrap();
        listen_before_mark(OldName::GoMmproxy, &words).map(|words| words.join(" "))
    };
    let script = "-allowed-subnets /a -mark 123 -l 1.2.3.4:5 -4 127.0.0.1:22 -6 [::1]:22 -v 1";
    let expected = "-l 1.2.3.4:5 -allowed-subnets /a -4 127.0.0.1:22 -6 [::1]:22 -v 1 -mark 123";
    assert_eq!(ordered(script).as_deref(), Some(expected));
    // what comes out stays as it is, so the program starts itself anew at most once
    assert_eq!(ordered(expected), None);
    assert_eq!(
        ordered("--mark=1 -dynamic-destination=false --l=1.2.3.4:5 -q").as_deref(),
        Some("-l 1.2.3.4:5 -dynamic-destination=false -q -mark 1")
    );
    for as_it_is in [
        "-l 1.2.3.4:5",
        "-mark 1",
        "",
        "-l 1.2.3.4:5 -mark 1",
        "-mark 1 stray",
    ] {
        assert_eq!(ordered(as_it_is), None, "{as_it_is}");
    }
}

#[test]
fn what_is_reordered_means_the_same() {
    for (line, _) in LINES {
        let words = shlex::split(&line.replace("CF", CF)).unwrap();
        let name = OldName::of(words[0].as_ref()).unwrap();
        if let Some(ordered) = listen_before_mark(name, &words[1..]) {
            assert_eq!(parse(name, &ordered), parse(name, &words[1..]), "{line}");
        }
    }
}

#[test]
fn every_flag_is_in_the_help() {
    let help = help(OldName::GoMmproxy);
    for flag in [
        "-l,",
        "-4,",
        "-6,",
        "-p,",
        "-mark,",
        "-v ",
        "-allowed-subnets,",
        "-listeners ",
        "-close-after ",
        "-dynamic-destination",
        "-listen-transparent",
        "-c FILE",
        "-table ",
    ] {
        assert!(help.contains(flag), "{flag}:\n{help}");
    }
}
