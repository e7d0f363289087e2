//! What each mistake looks like. Long, because the drawings are exact.

use std::fs;
use std::path::Path;

use snapbox::{assert_data_eq, str};

use super::*;

/// A directory with these three files.
fn directory(pathways: &str, instances: &str, allow: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(PATHWAYS), pathways).unwrap();
    fs::write(dir.path().join(INSTANCES), instances).unwrap();
    fs::write(dir.path().join(ALLOW), allow).unwrap();
    dir
}

/// Everything that is said about these files, without the last line's count.
fn said(pathways: &str, instances: &str, allow: &str) -> String {
    let dir = directory(pathways, instances, allow);
    let found = match load_with(dir.path(), None) {
        Ok(configuration) => configuration.warnings,
        Err(mistakes) => mistakes,
    };
    shown(&found, dir.path())
}

fn shown(found: &Diagnostics, dir: &Path) -> String {
    let text = found
        .to_string()
        .replace(dir.to_str().unwrap(), "/etc/mmproxy");
    match text.rfind("\n\nerror: ") {
        Some(end) if text.ends_with("nothing was changed") => text[..end].to_owned(),
        _ => text,
    }
}

const PROXY: &str = "192.0.2.1\n";
/// An instance that is right, so that its absence is not what a test sees.
const RIGHT: &str = "a\t1\t192.0.2.9:2222\t127.0.0.1\t22\t::1\n";

fn said_of_pathways(text: &str) -> String {
    said(text, &RIGHT.replace("\t1\t", "\t123\t"), PROXY)
}

fn said_of_instances(text: &str) -> String {
    said("1\n2\n", text, PROXY)
}

fn said_of_allow(text: &str) -> String {
    said("1\n", RIGHT, text)
}

#[test]
fn pathway_options() {
    assert_data_eq!(
        said_of_pathways("123 tabel=5"),
        str![[r#"
error: unknown option 'tabel'
 --> /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 tabel=5
  |     ^^^^^ expected one of table=, priority=, mask=, targets=, name=, connmark=
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 priority=50 priority=60"),
        str![[r#"
error: option priority= is given twice
 --> /etc/mmproxy/pathways.conf:1:17
  |
1 | 123 priority=50 priority=60
  |     ----------- ^^^^^^^^^^^ expected priority= once
  |     |
  |     first here
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 vps01 # the word name= is missing"),
        str![[r#"
error: 'vps01' is not an option
 --> /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 vps01 # the word name= is missing
  |     ^^^^^ expected key=value, the key one of table=, priority=, mask=, targets=, name=, connmark=
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 table=main priority=40000 mask=0 connmark=yes name=a/b"),
        str![[r#"
error: 'main' is not a table number
 --> /etc/mmproxy/pathways.conf:1:11
  |
1 | 123 table=main priority=40000 mask=0 connmark=yes name=a/b
  |           ^^^^ expected a table number other than 0, 253 (default), 254 (main) and 255 (local)

error: '40000' is not a rule priority
 --> /etc/mmproxy/pathways.conf:1:25
  |
1 | 123 table=main priority=40000 mask=0 connmark=yes name=a/b
  |                         ^^^^^ expected a priority from 1 to 32665, before the main table's rule

error: '0' is not a mask
 --> /etc/mmproxy/pathways.conf:1:36
  |
1 | 123 table=main priority=40000 mask=0 connmark=yes name=a/b
  |                                    ^ expected a mask other than 0 such as 0xff

error: 'yes' is not a connmark mode
 --> /etc/mmproxy/pathways.conf:1:47
  |
1 | 123 table=main priority=40000 mask=0 connmark=yes name=a/b
  |                                               ^^^ expected always, auto or off

error: 'a/b' is not a name
 --> /etc/mmproxy/pathways.conf:1:56
  |
1 | 123 table=main priority=40000 mask=0 connmark=yes name=a/b
  |                                                        ^^^ expected letters, digits, '.', '_' and '-', at most 64 of them
"#]]
    );
}

#[test]
fn pathway_marks_and_tables() {
    assert_data_eq!(
        said_of_pathways("123\n0\n0123\n12a\n"),
        str![[r#"
error: mark 0 means unmarked to the kernel
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 0
  | ^ expected a mark from 1 to 4294967295, decimal or 0x hexadecimal

error: '0123' is not a mark
 --> /etc/mmproxy/pathways.conf:3:1
  |
3 | 0123
  | ^^^^ expected a mark from 1 to 4294967295, decimal or 0x hexadecimal

error: '12a' is not a mark
 --> /etc/mmproxy/pathways.conf:4:1
  |
4 | 12a
  | ^^^ expected a mark from 1 to 4294967295, decimal or 0x hexadecimal
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n254\n"),
        str![[r#"
error: mark 254 cannot be its own table: table 254 belongs to the system
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 254
  | ^^^ expected table= with another number behind it, such as '254 table=1254'
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n124\n123\n"),
        str![[r#"
error: mark 123 is defined twice
 --> /etc/mmproxy/pathways.conf:3:1
  |
3 | 123
  | ^^^ expected each mark once
  |
 ::: /etc/mmproxy/pathways.conf:1:1
  |
1 | 123
  | --- first defined here
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n124 table=123\n"),
        str![[r#"
error: marks 123 and 124 both use table 123
 --> /etc/mmproxy/pathways.conf:2:5
  |
2 | 124 table=123
  |     ^^^^^^^^^ expected a table of its own, with table= (the default is the mark)
  |
 ::: /etc/mmproxy/pathways.conf:1:1
  |
1 | 123
  | --- table 123 of mark 123
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 table=124\n124\n"),
        str![[r#"
error: marks 123 and 124 both use table 124
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 124
  | ^^^ expected a table of its own, with table= (the default is the mark)
  |
 ::: /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 table=124
  |     --------- table 124 of mark 123
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 name=a\n124 name=a\n"),
        str![[r#"
error: two pathways are named a
 --> /etc/mmproxy/pathways.conf:2:5
  |
2 | 124 name=a
  |     ^^^^^^ expected a name of its own
  |
 ::: /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 name=a
  |     ------ the other one
"#]]
    );
}

#[test]
fn pathway_masks() {
    assert_data_eq!(
        said_of_pathways("123 mask=0x0f"),
        str![[r#"
error: mark 123 (0x7b) has bits outside its mask 0xf
 --> /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 mask=0x0f
  | --- ^^^^^^^^^ expected a mask with all bits of the mark, such as 0xff
  | |
  | the mark
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n379 mask=0xfff\n"),
        str![[r#"
error: mark 123 under its mask 0xff matches the packets of mark 379 too
 --> /etc/mmproxy/pathways.conf:1:1
  |
1 | 123
  | ^^^ expected masks that tell the two apart, such as mask=0x1ff
  |
 ::: /etc/mmproxy/pathways.conf:2:1
  |
2 | 379 mask=0xfff
  | --- 379 & 0xff = 123
"#]]
    );
    assert_data_eq!(
        said_of_pathways("379 mask=0xfff\n123\n"),
        str![[r#"
error: mark 123 under its mask 0xff matches the packets of mark 379 too
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 123
  | ^^^ expected masks that tell the two apart, such as mask=0x1ff
  |
 ::: /etc/mmproxy/pathways.conf:1:1
  |
1 | 379 mask=0xfff
  | --- 379 & 0xff = 123
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n0x10000\n"),
        str![[r#"
warning: mask 0xffffffff of mark 65536 has bits that Tailscale (0xff0000) and kube-proxy (0xc000) may set: such packets miss the pathway
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 0x10000
  | ^^^^^^^ expected a smaller mark where that runs on this host
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123\n52\n"),
        str![[r#"
warning: table 52 is the one that Tailscale fills
 --> /etc/mmproxy/pathways.conf:2:1
  |
2 | 52
  | ^^ expected table= with another number where Tailscale runs on this host
"#]]
    );
}

#[test]
fn pathway_targets() {
    assert_data_eq!(
        said_of_pathways(
            "123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0"
        ),
        str![[r#"
error: an entry of the list is empty
 --> /etc/mmproxy/pathways.conf:1:5
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: '10.0.0.0/33' is not a prefix
 --> /etc/mmproxy/pathways.conf:1:13
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |             ^^^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: 0.0.0.0/0 as target would lead every packet with the mark back to this host
 --> /etc/mmproxy/pathways.conf:1:26
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                          ^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: ::/0 as target would lead every packet with the mark back to this host
 --> /etc/mmproxy/pathways.conf:1:36
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                                    ^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: 224.0.0.1 is multicast
 --> /etc/mmproxy/pathways.conf:1:41
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                                         ^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: 126.0.0.0/7 covers loopback
 --> /etc/mmproxy/pathways.conf:1:51
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                                                   ^^^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: ::ffff:10.0.0.1 is IPv4 in IPv6 form
 --> /etc/mmproxy/pathways.conf:1:63
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                                                               ^^^^^^^^^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64

error: 0.0.0.0 is no address of a service
 --> /etc/mmproxy/pathways.conf:1:79
  |
1 | 123 targets=10.0.0.0/33,,0.0.0.0/0,::/0,224.0.0.1,126.0.0.0/7,::ffff:10.0.0.1,0.0.0.0
  |                                                                               ^^^^^^^ expected the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64
"#]]
    );
    assert_data_eq!(
        said_of_pathways("123 targets=127.0.0.1,::1,10.0.0.5/24,fd00::/64"),
        str![[r#"
warning: 127.0.0.1/32 is loopback, which every pathway serves anyway
 --> /etc/mmproxy/pathways.conf:1:13
  |
1 | 123 targets=127.0.0.1,::1,10.0.0.5/24,fd00::/64
  |             ^^^^^^^^^ expected addresses that are not loopback

warning: ::1/128 is loopback, which every pathway serves anyway
 --> /etc/mmproxy/pathways.conf:1:23
  |
1 | 123 targets=127.0.0.1,::1,10.0.0.5/24,fd00::/64
  |                       ^^^ expected addresses that are not loopback

warning: 10.0.0.5/24 has bits set behind its length
 --> /etc/mmproxy/pathways.conf:1:27
  |
1 | 123 targets=127.0.0.1,::1,10.0.0.5/24,fd00::/64
  |                           ^^^^^^^^^^^ expected 10.0.0.0/24
"#]]
    );
}

#[test]
fn columns_of_instances() {
    assert_data_eq!(
        said_of_instances("a  1  192.0.2.9:2222  127.0.0.1  22  ::1\n"),
        str![[r#"
error: spaces instead of a tab between columns
 --> /etc/mmproxy/instances.tsv:1:2
  |
1 | a  1  192.0.2.9:2222  127.0.0.1  22  ::1
  |  ^^ expected one tab
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1 192.0.2.9:2222\t127.0.0.1\t22\t::1\tport=any\n"),
        str![[r#"
error: spaces instead of a tab between columns
 --> /etc/mmproxy/instances.tsv:1:4
  |
1 | a    1 192.0.2.9:2222    127.0.0.1    22    ::1    port=any
  |       ^ expected one tab
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\n"),
        str![[r#"
error: 3 columns where 6 are needed
 --> /etc/mmproxy/instances.tsv:1:1
  |
1 | a    1    192.0.2.9:2222
  | ^^^^^^^^^^^^^^^^^^^^^^^^ expected name, fwmark, listen_addr, target_ipv4, target_port, target_ipv6 and at most options, one tab between them
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t127.0.0.1\t22\t::1\tport=any\tmore\n"),
        str![[r#"
error: 8 columns where at most 7 belong
 --> /etc/mmproxy/instances.tsv:1:46
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    port=any    more
  |                                                                   ^^^^ expected name, fwmark, listen_addr, target_ipv4, target_port, target_ipv6 and at most options
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t\t1\t192.0.2.9:2222\t\t127.0.0.1\t22\t::1\n"),
        str![[r#"
error: several tabs between columns
 --> /etc/mmproxy/instances.tsv:1:2
  |
1 | a        1    192.0.2.9:2222        127.0.0.1    22    ::1
  |  ^^^^^^^^ expected one tab
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t\t22\t::1\n"),
        str![[r#"
error: column 4 (target_ipv4) is empty
 --> /etc/mmproxy/instances.tsv:1:19
  |
1 | a    1    192.0.2.9:2222        22    ::1
  |                         ^^^^ expected an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served
"#]]
    );
}

#[test]
fn values_of_instances() {
    assert_data_eq!(
        said_of_instances("-a\tone\t192.0.2.9\tlocalhost\tssh\t[::1]:22\n"),
        str![[r#"
error: '-a' is not an instance name
 --> /etc/mmproxy/instances.tsv:1:1
  |
1 | -a    one    192.0.2.9    localhost    ssh    [::1]:22
  | ^^ expected letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64 of them

error: 'one' is not a mark
 --> /etc/mmproxy/instances.tsv:1:4
  |
1 | -a    one    192.0.2.9    localhost    ssh    [::1]:22
  |       ^^^ expected a mark from 1 to 4294967295, decimal or 0x hexadecimal

error: '192.0.2.9' is not a listen address
 --> /etc/mmproxy/instances.tsv:1:8
  |
1 | -a    one    192.0.2.9    localhost    ssh    [::1]:22
  |              ^^^^^^^^^ expected an address and a port such as 100.64.0.1:2222 or [fd00::1]:2222, a range of ports such as 100.64.0.1:10000-10999, or a Unix socket such as unix:/run/mmproxy/web.sock

error: 'ssh' is not a port
 --> /etc/mmproxy/instances.tsv:1:28
  |
1 | -a    one    192.0.2.9    localhost    ssh    [::1]:22
  |                                        ^^^ expected a port from 1 to 65535, or a range such as 10000-10999, the smaller one first

error: '[::1]:22' has a port, which belongs in column 5 (target_port)
 --> /etc/mmproxy/instances.tsv:1:32
  |
1 | -a    one    192.0.2.9    localhost    ssh    [::1]:22
  |                                               ^^^^^^^^ expected an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t::1\t22\t127.0.0.1\n"),
        str![[r#"
error: ::1 is an IPv6 address in the IPv4 column
 --> /etc/mmproxy/instances.tsv:1:20
  |
1 | a    1    192.0.2.9:2222    ::1    22    127.0.0.1
  |                             ^^^ expected an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served

error: 127.0.0.1 is an IPv4 address in the IPv6 column
 --> /etc/mmproxy/instances.tsv:1:27
  |
1 | a    1    192.0.2.9:2222    ::1    22    127.0.0.1
  |                                          ^^^^^^^^^ expected an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t0.0.0.0\t0\t::\n"),
        str![[r#"
error: 0.0.0.0 is no target: it means every address of this host; name the one the service waits at, often 127.0.0.1
 --> /etc/mmproxy/instances.tsv:1:20
  |
1 | a    1    192.0.2.9:2222    0.0.0.0    0    ::
  |                             ^^^^^^^ expected an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served

error: '0' is not a port
 --> /etc/mmproxy/instances.tsv:1:28
  |
1 | a    1    192.0.2.9:2222    0.0.0.0    0    ::
  |                                        ^ expected a port from 1 to 65535, or a range such as 10000-10999, the smaller one first

error: :: is no target: it means every address of this host; name the one the service waits at, often ::1
 --> /etc/mmproxy/instances.tsv:1:30
  |
1 | a    1    192.0.2.9:2222    0.0.0.0    0    ::
  |                                             ^^ expected an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t224.0.0.1\t22\t::ffff:127.0.0.1\n"),
        str![[r#"
error: 224.0.0.1 is no target: it is multicast
 --> /etc/mmproxy/instances.tsv:1:20
  |
1 | a    1    192.0.2.9:2222    224.0.0.1    22    ::ffff:127.0.0.1
  |                             ^^^^^^^^^ expected an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served

error: ::ffff:127.0.0.1 is no target: it is an IPv4 address in IPv6 form, which IPv6 clients cannot be passed on to
 --> /etc/mmproxy/instances.tsv:1:33
  |
1 | a    1    192.0.2.9:2222    224.0.0.1    22    ::ffff:127.0.0.1
  |                                                ^^^^^^^^^^^^^^^^ expected an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:2222\t-\t22\t-\n"),
        str![[r#"
error: neither family has a target
 --> /etc/mmproxy/instances.tsv:1:25
  |
1 | a    1    192.0.2.9:2222    -    22    -
  |                             - nor here ^ expected an address in column 4 (target_ipv4) or column 6 (target_ipv6)
"#]]
    );
}

#[test]
fn options_of_instances() {
    let with = |options: &str| said_of_instances(&RIGHT.replace('\n', &format!("\t{options}\n")));
    assert_data_eq!(
        with("timeout=5s,port=any,port=keep,,x"),
        str![[r#"
error: unknown option 'timeout'
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    timeout=5s,port=any,port=keep,,x
  |                                                       ^^^^^^^ expected one of protocol=, udp-header=, idle-timeout=, header-timeout=, connect-timeout=, allow=, listeners=, listen=, port=, max-connections=, max-flows=, max-flows-per-proxy=, socket-mode=, socket-owner=, resolve=, target=, destinations=

error: nothing between two commas, or behind the last
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    timeout=5s,port=any,port=keep,,x
  |                                                       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected key=value words with one comma between them

error: option port= is given twice
 --> /etc/mmproxy/instances.tsv:1:57
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    timeout=5s,port=any,port=keep,,x
  |                                                                  -------- ^^^^^^^^^ expected port= once
  |                                                                  |
  |                                                                  first here

error: 'x' is not an option
 --> /etc/mmproxy/instances.tsv:1:68
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    timeout=5s,port=any,port=keep,,x
  |                                                                                      ^ expected key=value, the key one of protocol=, udp-header=, idle-timeout=, header-timeout=, connect-timeout=, allow=, listeners=, listen=, port=, max-connections=, max-flows=, max-flows-per-proxy=, socket-mode=, socket-owner=, resolve=, target=, destinations=
"#]]
    );
    assert_data_eq!(
        with("protocol=tcp,udp-header=spp"),
        str![[r#"
error: udp-header= means nothing for protocol=tcp
 --> /etc/mmproxy/instances.tsv:1:50
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    protocol=tcp,udp-header=spp
  |                                                       ------------ ^^^^^^^^^^^^^^ expected udp-header= with protocol=udp only
  |                                                       |
  |                                                       the protocol
"#]]
    );
    assert_data_eq!(
        with("udp-header=spp"),
        str![[r#"
error: udp-header= means nothing for protocol=tcp
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    udp-header=spp
  |                                                       ^^^^^^^^^^^^^^ expected udp-header= with protocol=udp only
"#]]
    );
    assert_data_eq!(
        with("connect-timeout=2s,protocol=udp"),
        str![[r#"
error: connect-timeout= means nothing for protocol=udp
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    connect-timeout=2s,protocol=udp
  |                                                       ^^^^^^^^^^^^^^^^^^ ------------ the protocol
  |                                                       |
  |                                                       expected connect-timeout= with protocol=tcp only
"#]]
    );
    assert_data_eq!(
        with("protocol=udp,max-flows-per-proxy=1001,max-flows=1000"),
        str![[r#"
error: one proxy would have more flows than all together, max-flows=1000
 --> /etc/mmproxy/instances.tsv:1:70
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    protocol=udp,max-flows-per-proxy=1001,max-flows=1000
  |                                                                                        ^^^^ -------------- all together
  |                                                                                        |
  |                                                                                        expected a number from 1 to 1000
"#]]
    );
    assert_data_eq!(
        with("max-flows-per-proxy=65537,protocol=udp"),
        str![[r#"
error: one proxy would have more flows than all together, by default 65536
 --> /etc/mmproxy/instances.tsv:1:57
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    max-flows-per-proxy=65537,protocol=udp
  |                                                                           ^^^^^ expected a number from 1 to 65536, or max-flows= as well
"#]]
    );
    for right in [
        "max-flows-per-proxy=65536",
        "max-flows-per-proxy=1000,max-flows=1000",
        "max-flows-per-proxy=100000,max-flows=100000",
    ] {
        assert_eq!(with(&format!("protocol=udp,{right}")), "", "{right}");
    }
    assert_data_eq!(
        with("protocol=sctp,udp-header=spp"),
        str![[r#"
error: 'sctp' is not a protocol
 --> /etc/mmproxy/instances.tsv:1:46
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    protocol=sctp,udp-header=spp
  |                                                                ^^^^ expected tcp or udp
"#]]
    );
    assert_data_eq!(
        with(
            "idle-timeout=5,header-timeout=1s,connect-timeout=0s,listeners=0,max-connections=many,allow="
        ),
        str![[r#"
error: '5' has no unit
 --> /etc/mmproxy/instances.tsv:1:50
  |
1 | ...    22    ::1    idle-timeout=5,header-timeout=1s,connect-timeout=0s,listeners=0,max-connections=many,allow=
  |                                  ^ expected a whole number with a unit such as 500ms, 5s, 2m, 1h or 1d

warning: one lost packet of the proxy takes longer than this header-timeout
 --> /etc/mmproxy/instances.tsv:1:52
  |
1 | ... 22    ::1    idle-timeout=5,header-timeout=1s,connect-timeout=0s,listeners=0,max-connections=many,allow=
  |                                 ^^^^^^^^^^^^^^^^^ expected at least 3s, as the PROXY protocol recommends

error: '0s' leaves no time at all
 --> /etc/mmproxy/instances.tsv:1:86
  |
1 | ...er-timeout=1s,connect-timeout=0s,listeners=0,max-connections=many,allow=
  |                                  ^^ expected a whole number with a unit such as 500ms, 5s, 2m, 1h or 1d

error: '0' is not a number of listeners
 --> /etc/mmproxy/instances.tsv:1:99
  |
1 | ...,header-timeout=1s,connect-timeout=0s,listeners=0,max-connections=many,allow=
  |                                                    ^ expected a number from 1 to 1024

error: 'many' is not a number of connections or flows
 --> /etc/mmproxy/instances.tsv:1:117
  |
1 | ...ect-timeout=0s,listeners=0,max-connections=many,allow=
  |                                               ^^^^ expected a number from 1 to 4294967295

error: allow= names no file
 --> /etc/mmproxy/instances.tsv:1:122
  |
1 | ...=0s,listeners=0,max-connections=many,allow=
  |                                         ^^^^^^ expected a file, absolute or beside instances.tsv
"#]]
    );
    assert_data_eq!(
        with("port=any listeners=2"),
        str![[r#"
error: a space in an option
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    port=any listeners=2
  |                                                       ^^^^^^^^^^^^^^^^^^^^ expected key=value words with one comma between them
"#]]
    );
    assert_data_eq!(
        with("allow=none.txt"),
        str![[r#"
error: cannot read /etc/mmproxy/none.txt: No such file or directory
 --> /etc/mmproxy/instances.tsv:1:37
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1    allow=none.txt
  |                                                       ^^^^^^^^^^^^^^ expected a file with the trusted proxies of this instance; no list never means everyone
"#]]
    );
}

#[test]
fn instances_against_each_other() {
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:2222\t127.0.0.1\t22\t::1\n\n\
             a\t3\t192.0.2.9:2222\t127.0.0.1\t23\t::1\n"
        ),
        str![[r#"
error: two instances are named a
 --> /etc/mmproxy/instances.tsv:3:1
  |
3 | a    3    192.0.2.9:2222    127.0.0.1    23    ::1
  | ^ expected a name of its own
  |
 ::: /etc/mmproxy/instances.tsv:1:1
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1
  | - the first one

error: no pathway has mark 3
 --> /etc/mmproxy/instances.tsv:3:3
  |
3 | a    3    192.0.2.9:2222    127.0.0.1    23    ::1
  |      ^ expected one of the marks that pathways.conf has: 1, 2

error: two instances listen on 192.0.2.9:2222 (tcp)
 --> /etc/mmproxy/instances.tsv:3:5
  |
3 | a    3    192.0.2.9:2222    127.0.0.1    23    ::1
  |           ^^^^^^^^^^^^^^ expected an address or a port of its own
  |
 ::: /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    ::1
  |           -------------- the first one
"#]]
    );
    // the other protocol's port is another port
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:53\t127.0.0.1\t5353\t::1\n\
             b\t1\t192.0.2.9:53\t127.0.0.1\t5353\t::1\tprotocol=udp\n"
        ),
        str![""]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:2222\t127.0.0.1\t22\t-\n\
             b\t1\t:2222\t127.0.0.1\t23\t-\n"
        ),
        str![[r#"
warning: another instance listens on port 2222 of every address: what goes to 192.0.2.9 comes here
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    192.0.2.9:2222    127.0.0.1    22    -
  |           ^^^^^^^^^^^^^^ expected different ports, unless this is meant
  |
 ::: /etc/mmproxy/instances.tsv:2:5
  |
2 | b    1    :2222    127.0.0.1    23    -
  |           ----- every address
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t0.0.0.0:22\t127.0.0.1\t22\t::1\n\
             b\t1\t[::1]:23\t-\t23\t::1\n\
             c\t1\t127.0.0.1:24\t127.0.0.1\t22\t-\n"
        ),
        str![[r#"
error: target 127.0.0.1:22 is where this instance itself listens
 --> /etc/mmproxy/instances.tsv:1:16
  |
1 | a    1    0.0.0.0:22    127.0.0.1    22    ::1
  |           ----------    ^^^^^^^^^ expected the service's address and port
  |           |
  |           its listen address

error: target [::1]:23 is where this instance itself listens
 --> /etc/mmproxy/instances.tsv:2:19
  |
2 | b    1    [::1]:23    -    23    ::1
  |           --------               ^^^ expected the service's address and port
  |           |
  |           its listen address

warning: target 127.0.0.1:22 is where another instance listens, which waits for a PROXY header
 --> /etc/mmproxy/instances.tsv:3:18
  |
3 | c    1    127.0.0.1:24    127.0.0.1    22    -
  |                           ^^^^^^^^^ expected the service's address and port
  |
 ::: /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    0.0.0.0:22    127.0.0.1    22    ::1
  |           ---------- the other instance
"#]]
    );
}

#[test]
fn allow_list_lines() {
    assert_data_eq!(
        said_of_allow("10.0.0.1 # fine\n100.x.x.x\n10.0.0.1, 10.0.0.2\nproxy.example\n"),
        str![[r#"
error: '100.x.x.x' is not a prefix
 --> /etc/mmproxy/allow.txt:2:1
  |
2 | 100.x.x.x
  | ^^^^^^^^^ expected an address or a prefix such as 100.64.0.1, 10.0.0.0/8 or fd00::/8; everyone is 0.0.0.0/0 and ::/0, written out

error: more than one word on a line
 --> /etc/mmproxy/allow.txt:3:1
  |
3 | 10.0.0.1, 10.0.0.2
  | ^^^^^^^^^^^^^^^^^^ expected one address or prefix a line, a comment behind '#'

error: 'proxy.example' is not a prefix
 --> /etc/mmproxy/allow.txt:4:1
  |
4 | proxy.example
  | ^^^^^^^^^^^^^ expected an address or a prefix such as 100.64.0.1, 10.0.0.0/8 or fd00::/8; everyone is 0.0.0.0/0 and ::/0, written out
"#]]
    );
    assert_data_eq!(
        said_of_allow("# nobody yet\n\n"),
        str![[r#"
error: the allow list is empty, so no proxy could connect
--> /etc/mmproxy/allow.txt
 = help: expected at least one trusted proxy's address; everyone is 0.0.0.0/0 and ::/0, written out
"#]]
    );
    assert_data_eq!(
        said_of_allow(""),
        str![[r#"
error: the allow list is empty, so no proxy could connect
--> /etc/mmproxy/allow.txt
 = help: expected at least one trusted proxy's address; everyone is 0.0.0.0/0 and ::/0, written out
"#]]
    );
    assert_data_eq!(
        said_of_allow("0.0.0.0/0\n10.0.0.1/8\n"),
        str![[r#"
warning: 0.0.0.0/0 lets everyone who can connect claim to be any client
 --> /etc/mmproxy/allow.txt:1:1
  |
1 | 0.0.0.0/0
  | ^^^^^^^^^ expected the proxies' own addresses, unless a firewall keeps everyone else away

warning: 10.0.0.1/8 has bits set behind its length
 --> /etc/mmproxy/allow.txt:2:1
  |
2 | 10.0.0.1/8
  | ^^^^^^^^^^ expected 10.0.0.0/8
"#]]
    );
}

#[test]
fn characters_that_nobody_sees() {
    // not as drawings: they would stand in this file, as invisible as anywhere
    let said = said_of_pathways("123\u{a0}name=a\n");
    assert!(
        said.starts_with("error: invisible character U+00A0 (no-break space)\n --> /etc/mmproxy/pathways.conf:1:4\n"),
        "{said}"
    );
    assert_data_eq!(
        said_of_instances("a\t1\0\tb\n"),
        str![[r#"
error: invisible character U+0000 (NUL)
 --> /etc/mmproxy/instances.tsv:1:4
  |
1 | a    1␀    b
  |       ^ expected printable text in UTF-8
"#]]
    );
    let said = said_of_allow("\u{feff}10.0.0.1\n10.0.0.2\u{200b}\n");
    assert!(said.starts_with("error: invisible character U+200B (zero-width space)\n --> /etc/mmproxy/allow.txt:2:9\n"), "{said}");
}

#[test]
fn files_that_cannot_be_read() {
    let dir = directory("1\n", RIGHT, PROXY);
    fs::remove_file(dir.path().join(ALLOW)).unwrap();
    fs::remove_file(dir.path().join(PATHWAYS)).unwrap();
    fs::create_dir(dir.path().join(PATHWAYS)).unwrap();
    let mistakes = load_with(dir.path(), None).unwrap_err();
    assert_data_eq!(
        shown(&mistakes, dir.path()),
        str![[r#"
error: cannot read /etc/mmproxy/pathways.conf: Is a directory
--> /etc/mmproxy/pathways.conf
 = help: expected a text file in UTF-8, in the directory that --config-dir names, else $MMPROXY_CONFIG_DIR, else /etc/mmproxy

error: cannot read /etc/mmproxy/allow.txt: No such file or directory
--> /etc/mmproxy/allow.txt
 = help: expected the trusted proxies in $ALLOW_LIST_PATH, else in allow.txt in the configuration directory; no list never means everyone
"#]]
    );

    let dir = directory("1\n", RIGHT, PROXY);
    fs::write(dir.path().join(INSTANCES), b"\xff\xfea\0\t\0").unwrap();
    fs::write(dir.path().join(PATHWAYS), vec![b'#'; 5 << 20]).unwrap();
    let mistakes = load_with(dir.path(), None).unwrap_err();
    assert_data_eq!(
        shown(&mistakes, dir.path()),
        str![[r#"
error: cannot read /etc/mmproxy/pathways.conf: larger than 4 MiB
--> /etc/mmproxy/pathways.conf
 = help: expected a text file in UTF-8, in the directory that --config-dir names, else $MMPROXY_CONFIG_DIR, else /etc/mmproxy

error: cannot read /etc/mmproxy/instances.tsv: UTF-16 text, UTF-8 is needed
--> /etc/mmproxy/instances.tsv
 = help: expected a text file in UTF-8, in the directory that --config-dir names, else $MMPROXY_CONFIG_DIR, else /etc/mmproxy
"#]]
    );

    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no");
    let mistakes = load_with(&missing, None).unwrap_err();
    assert_data_eq!(
        shown(&mistakes, dir.path()),
        str![[r#"
error: cannot read /etc/mmproxy/no: No such file or directory
--> /etc/mmproxy/no
 = help: expected a directory, named by --config-dir, else by $MMPROXY_CONFIG_DIR, else /etc/mmproxy
"#]]
    );
}

#[test]
fn latin1_in_comments_is_no_mistake() {
    let dir = directory("", RIGHT, PROXY);
    fs::write(dir.path().join(PATHWAYS), b"# M\xfcller\n1 # B\xf6rse\n").unwrap();
    assert_eq!(load_with(dir.path(), None).unwrap().pathways.len(), 1);
}

#[test]
fn very_many_mistakes_are_counted() {
    let dir = directory("1\n", RIGHT, &"x\n".repeat(10_000));
    let mistakes = load_with(dir.path(), None).unwrap_err();
    assert_eq!(mistakes.errors(), 10_000);
    assert_eq!(mistakes.iter().count(), 200);
    let text = mistakes.to_string();
    assert!(text.contains("… and 9800 more"), "{text}");
    assert!(text.ends_with(
        "10000 mistakes in the configuration: nothing was started, nothing was changed"
    ));
}

#[test]
fn targets_are_merged_into_their_pathways() {
    let dir = directory(
        "1 targets=10.0.0.0/24\n2\n",
        "a\t1\t192.0.2.9:1\t10.1.0.5\t22\tfd00::5\n\
         b\t1\t192.0.2.9:2\t127.0.0.2\t22\t::1\n\
         c\t2\t192.0.2.9:3\t-\t22\t[fd00::6]\n",
        PROXY,
    );
    let configuration = load_with(dir.path(), None).unwrap();
    let targets = |mark| -> Vec<String> {
        let pathway = configuration.pathway(Mark::new(mark).unwrap()).unwrap();
        pathway.targets.iter().map(ToString::to_string).collect()
    };
    assert_eq!(targets(1), ["10.0.0.0/24", "10.1.0.5/32", "fd00::5/128"]);
    assert_eq!(targets(2), ["fd00::6/128"]);
}

#[test]
fn each_instance_has_its_allow_list() {
    let dir = directory(
        "1\n",
        "a\t1\t192.0.2.9:1\t127.0.0.1\t22\t-\n\
         b\t1\t192.0.2.9:2\t127.0.0.1\t22\t-\tallow=b.txt\n\
         c\t1\t192.0.2.9:3\t127.0.0.1\t22\t-\tallow=./b.txt\n\
         d\t1\t192.0.2.9:4\t127.0.0.1\t22\t-\tallow=allow.txt\n",
        PROXY,
    );
    fs::write(dir.path().join("b.txt"), "198.51.100.7\n").unwrap();
    let configuration = load_with(dir.path(), None).unwrap();
    let allowed = |name: &str| {
        let instance = configuration.instance(name).unwrap();
        configuration.allow_list(instance).prefixes()[0].addr()
    };
    assert_eq!(allowed("a").to_string(), "192.0.2.1");
    assert_eq!(allowed("b").to_string(), "198.51.100.7");
    assert_eq!(allowed("c").to_string(), "198.51.100.7");
    assert_eq!(allowed("d").to_string(), "192.0.2.1");
}

#[test]
fn the_environment_names_the_allow_list() {
    let dir = directory("1\n", RIGHT, "not read\n");
    let elsewhere = dir.path().join("proxies");
    fs::write(&elsewhere, PROXY).unwrap();
    let configuration = load_with(dir.path(), Some(elsewhere.as_os_str())).unwrap();
    assert_eq!(configuration.default_allow_path, elsewhere);
    assert!(load_with(dir.path(), None).is_err());
    assert!(load_with(dir.path(), Some(OsStr::new(""))).is_err());
}

#[test]
fn routing_needs_neither_file() {
    let dir = tempfile::tempdir().unwrap();
    let files = load_pathways(dir.path()).unwrap();
    assert!(files.pathways.is_empty() && files.instances.is_empty());
    assert!(files.pathway_or_defaults(Mark::new(254).unwrap()).is_none());

    // instances without pathways.conf still say what their mark's targets are
    fs::write(
        dir.path().join(INSTANCES),
        RIGHT.replace("127.0.0.1", "10.0.0.5"),
    )
    .unwrap();
    let files = load_pathways(dir.path()).unwrap();
    let pathway = files.pathway_or_defaults(Mark::new(1).unwrap()).unwrap();
    assert_eq!(pathway.targets.len(), 1);

    fs::write(dir.path().join(PATHWAYS), "2\n").unwrap();
    assert_eq!(load_pathways(dir.path()).unwrap_err().errors(), 1);
}

#[test]
fn ranges_of_ports() {
    for (lines, expected) in [
        // the same length, one port, and two ranges side by side
        (
            "a\t1\t192.0.2.9:10000-10999\t127.0.0.1\t20000-20999\t::1\n",
            str![],
        ),
        ("a\t1\t192.0.2.9:10000-10999\t127.0.0.1\t22\t::1\n", str![]),
    ] {
        assert_data_eq!(said_of_instances(lines), expected);
    }
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:10000-10999\t127.0.0.1\t22\t-\n\
             b\t1\t192.0.2.9:11000\t127.0.0.1\t22\t-\n\
             c\t1\t192.0.2.9:10999-11005\t127.0.0.1\t22\t-\n"
        ),
        str![[r#"
error: two instances listen on 192.0.2.9:11000 (tcp)
 --> /etc/mmproxy/instances.tsv:3:5
  |
3 | c    1    192.0.2.9:10999-11005    127.0.0.1    22    -
  |           ^^^^^^^^^^^^^^^^^^^^^ expected an address or a port of its own
  |
 ::: /etc/mmproxy/instances.tsv:2:5
  |
2 | b    1    192.0.2.9:11000    127.0.0.1    22    -
  |           --------------- the first one
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t[fd00::1]:1-9\t127.0.0.1\t22\t-\n\
             b\t1\t[fd00::1]:1-9\t127.0.0.1\t22\t-\tprotocol=udp\n\
             c\t1\t[::]:9-20\t127.0.0.1\t22\t-\n"
        ),
        str![[r#"
warning: another instance listens on port 9 of every address: what goes to fd00::1 comes here
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    [fd00::1]:1-9    127.0.0.1    22    -
  |           ^^^^^^^^^^^^^ expected different ports, unless this is meant
  |
 ::: /etc/mmproxy/instances.tsv:3:5
  |
3 | c    1    [::]:9-20    127.0.0.1    22    -
  |           --------- every address
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:10-19\t127.0.0.1\t20-28\t-\n"),
        str![[r#"
error: 9 target ports, and there are 10 ports to listen on
 --> /etc/mmproxy/instances.tsv:1:31
  |
1 | a    1    192.0.2.9:10-19    127.0.0.1    20-28    -
  |           ---------------                 ^^^^^ expected one port, or a range of 10
  |           |
  |           the listen address
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:10\t127.0.0.1\t20-28\t-\n"),
        str![[r#"
error: 9 target ports, and there is one port to listen on
 --> /etc/mmproxy/instances.tsv:1:28
  |
1 | a    1    192.0.2.9:10    127.0.0.1    20-28    -
  |           ------------                 ^^^^^ expected one port
  |           |
  |           the listen address
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:19-10\t127.0.0.1\t28-20\t-\n"),
        str![[r#"
error: the range of ports 19-10 ends before it begins
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    192.0.2.9:19-10    127.0.0.1    28-20    -
  |           ^^^^^^^^^^^^^^^ expected an address and a port such as 100.64.0.1:2222 or [fd00::1]:2222, a range of ports such as 100.64.0.1:10000-10999, or a Unix socket such as unix:/run/mmproxy/web.sock

error: the range of ports 28-20 ends before it begins
 --> /etc/mmproxy/instances.tsv:1:31
  |
1 | a    1    192.0.2.9:19-10    127.0.0.1    28-20    -
  |                                           ^^^^^ expected a port from 1 to 65535, or a range such as 10000-10999, the smaller one first
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t127.0.0.1:10-19\t127.0.0.1\t15\t-\n\
             b\t1\t127.0.0.1:20-29\t127.0.0.1\t10-19\t-\n"
        ),
        str![[r#"
error: target 127.0.0.1:15 is where this instance itself listens
 --> /etc/mmproxy/instances.tsv:1:21
  |
1 | a    1    127.0.0.1:10-19    127.0.0.1    15    -
  |           ---------------    ^^^^^^^^^ expected the service's address and port
  |           |
  |           its listen address

warning: target 127.0.0.1:10-19 is where another instance listens, which waits for a PROXY header
 --> /etc/mmproxy/instances.tsv:2:21
  |
2 | b    1    127.0.0.1:20-29    127.0.0.1    10-19    -
  |                              ^^^^^^^^^ expected the service's address and port
  |
 ::: /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    127.0.0.1:10-19    127.0.0.1    15    -
  |           --------------- the other instance
"#]]
    );
}

#[test]
fn unix_sockets() {
    assert_data_eq!(
        said_of_instances(
            "a\t1\tunix:/run/a.sock\t127.0.0.1\t22\t-\tsocket-mode=0660,socket-owner=:haproxy\n"
        ),
        str![]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\tunix:/run/a.sock\t127.0.0.1\t22\t-\n\
             b\t1\tunix:/run/a.sock\t127.0.0.1\t23\t-\n"
        ),
        str![[r#"
error: two instances listen on unix:/run/a.sock (tcp)
 --> /etc/mmproxy/instances.tsv:2:5
  |
2 | b    1    unix:/run/a.sock    127.0.0.1    23    -
  |           ^^^^^^^^^^^^^^^^ expected an address or a port of its own
  |
 ::: /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    unix:/run/a.sock    127.0.0.1    22    -
  |           ---------------- the first one
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\tunix:@a\t127.0.0.1\t22\t-\n"),
        str![[r#"
error: 'unix:@a' is an abstract socket, which everyone on this host may open
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    unix:@a    127.0.0.1    22    -
  |           ^^^^^^^ expected unix: and an absolute path of at most 107 bytes such as unix:/run/mmproxy/web.sock
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\tunix:/run/a.sock\t127.0.0.1\t22-23\t-\n"),
        str![[r#"
error: 2 target ports, and a Unix socket has no ports
 --> /etc/mmproxy/instances.tsv:1:32
  |
1 | a    1    unix:/run/a.sock    127.0.0.1    22-23    -
  |           ----------------                 ^^^^^ expected one port
  |           |
  |           the listen address
"#]]
    );
    assert_data_eq!(
        said_of_instances("a\t1\tunix:/run/a.sock\t127.0.0.1\t22\t-\tprotocol=udp,listeners=2\n"),
        str![[r#"
error: a Unix socket carries connections, and this instance is protocol=udp
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    unix:/run/a.sock    127.0.0.1    22    -    protocol=udp,listeners=2
  |           ^^^^^^^^^^^^^^^^ expected an address and a port

error: listeners= means nothing for a Unix socket
 --> /etc/mmproxy/instances.tsv:1:50
  |
1 | a    1    unix:/run/a.sock    127.0.0.1    22    -    protocol=udp,listeners=2
  |           ---------------- the listen address                      ^^^^^^^^^^^ expected listeners= with an address and a port only
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:10\t127.0.0.1\t22\t-\tsocket-mode=660\n\
             b\t1\tunix:/run/b.sock\t127.0.0.1\t22\t-\tsocket-mode=rw,socket-owner=a:b:c\n"
        ),
        str![[r#"
error: socket-mode= means nothing for an address and a port
 --> /etc/mmproxy/instances.tsv:1:33
  |
1 | a    1    192.0.2.9:10    127.0.0.1    22    -    socket-mode=660
  |           ------------ the listen address         ^^^^^^^^^^^^^^^ expected socket-mode= with a Unix socket, unix:/path, only

error: 'rw' is not a file mode
 --> /etc/mmproxy/instances.tsv:2:49
  |
2 | b    1    unix:/run/b.sock    127.0.0.1    22    -    socket-mode=rw,socket-owner=a:b:c
  |                                                                   ^^ expected octal permissions such as 0660, at most 0777

error: 'a:b:c' is not an owner
 --> /etc/mmproxy/instances.tsv:2:65
  |
2 | b    1    unix:/run/b.sock    127.0.0.1    22    -    socket-mode=rw,socket-owner=a:b:c
  |                                                                                   ^^^^^ expected user, user:group or :group such as :haproxy
"#]]
    );
}

#[test]
fn targets_that_are_names_or_in_the_header() {
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:1\tdb.internal\t22\tdocker:web@front\tresolve=5s\n\
             b\t1\t192.0.2.9:2\t-\t-\t-\ttarget=header,destinations=10.0.0.0/24+fd00:1::/64\n"
        ),
        str![]
    );
    assert_data_eq!(
        said_of_instances("a\t1\t192.0.2.9:1\t127.0.0.l\t22\tdocker:a/b\tresolve=5ms\n"),
        str![[r#"
error: '127.0.0.l' is neither an IPv4 address nor a name
 --> /etc/mmproxy/instances.tsv:1:17
  |
1 | a    1    192.0.2.9:1    127.0.0.l    22    docker:a/b    resolve=5ms
  |                          ^^^^^^^^^ expected an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served

error: 'docker:a/b' names no container
 --> /etc/mmproxy/instances.tsv:1:30
  |
1 | a    1    192.0.2.9:1    127.0.0.l    22    docker:a/b    resolve=5ms
  |                                             ^^^^^^^^^^ expected an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served

error: '5ms' is too short to look names up again
 --> /etc/mmproxy/instances.tsv:1:49
  |
1 | a    1    192.0.2.9:1    127.0.0.l    22    docker:a/b    resolve=5ms
  |                                                                   ^^^ expected 1s or more
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t192.0.2.9:1\t-\t-\t-\ttarget=header\n\
             b\t1\t192.0.2.9:2\t127.0.0.1\t22\t-\tdestinations=10.0.0.1\n\
             c\t1\t192.0.2.9:3\t127.0.0.1\t22\t-\ttarget=header,destinations=0.0.0.0/0++x\n\
             d\t1\t192.0.2.9:4\t-\t-\t-\ttarget=me\n"
        ),
        str![[r#"
error: target=header without destinations=
 --> /etc/mmproxy/instances.tsv:1:23
  |
1 | a    1    192.0.2.9:1    -    -    -    target=header
  |                                         ^^^^^^^^^^^^^ expected destinations=: the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64

error: destinations= means nothing without target=header
 --> /etc/mmproxy/instances.tsv:2:32
  |
2 | b    1    192.0.2.9:2    127.0.0.1    22    -    destinations=10.0.0.1
  |                                                  ^^^^^^^^^^^^^^^^^^^^^ expected target=header beside it

error: column 4 (target_ipv4) with target=header
 --> /etc/mmproxy/instances.tsv:3:17
  |
3 | c    1    192.0.2.9:3    127.0.0.1    22    -    target=header,destinations=0.0.0.0/0++x
  |                          ^^^^^^^^^ expected -, because the header says where the service is

error: column 5 (target_port) with target=header
 --> /etc/mmproxy/instances.tsv:3:27
  |
3 | c    1    192.0.2.9:3    127.0.0.1    22    -    target=header,destinations=0.0.0.0/0++x
  |                                       ^^ expected -, because the header says where the service is

error: destinations= has an empty entry
 --> /etc/mmproxy/instances.tsv:3:46
  |
3 | c    1    192.0.2.9:3    127.0.0.1    22    -    target=header,destinations=0.0.0.0/0++x
  |                                                                ^^^^^^^^^^^^^^^^^^^^^^^^^ expected the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64

error: 0.0.0.0/0 as target would lead every packet with the mark back to this host
 --> /etc/mmproxy/instances.tsv:3:59
  |
3 | c    1    192.0.2.9:3    127.0.0.1    22    -    target=header,destinations=0.0.0.0/0++x
  |                                                                             ^^^^^^^^^ expected the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64

error: 'x' is not a prefix
 --> /etc/mmproxy/instances.tsv:3:70
  |
3 | c    1    192.0.2.9:3    127.0.0.1    22    -    target=header,destinations=0.0.0.0/0++x
  |                                                                                        ^ expected the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64

error: target= is something else than 'header'
 --> /etc/mmproxy/instances.tsv:4:23
  |
4 | d    1    192.0.2.9:4    -    -    -    target=me
  |                                         ^^^^^^^^^ expected target=header, or no target= and the service in columns 4 to 6

error: target=header without destinations=
 --> /etc/mmproxy/instances.tsv:4:23
  |
4 | d    1    192.0.2.9:4    -    -    -    target=me
  |                                         ^^^^^^^^^ expected destinations=: the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64
"#]]
    );
}

#[test]
fn transparent_listeners() {
    assert_eq!(
        said_of_instances(
            "a\t1\t203.0.113.0/24:443\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             b\t1\t[2001:db8:5::]/64:1000-2000\t-\t3000-4000\t::1\tlisten=transparent\n\
             c\t1\t203.0.113.0/24:443\t127.0.0.1\t443\t::1\tlisten=transparent,protocol=udp\n\
             d\t1\t203.0.113.0/24:444-500\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             e\t1\t203.0.114.9:443\t203.0.114.9\t443\t::1\tlisten=transparent\n\
             f\t2\t0.0.0.0:8443\t127.0.0.1\t443\t::1\tlisten=transparent\n"
        ),
        ""
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t203.0.113.0/24:443\t127.0.0.1\t443\t::1\n\
             b\t1\t203.0.113.7/24:443\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             c\t1\tunix:/run/x.sock\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             d\t1\t192.0.2.9:443\t127.0.0.1\t443\t::1\tlisten=all\n\
             e\t1\t127.0.0.1:444\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             f\t1\t0.0.0.0/0:444\t127.0.0.1\t443\t::1\tlisten=transparent\n"
        ),
        str![[r#"
error: 203.0.113.0/24:443 is a network, of which no socket can have more than one address
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    203.0.113.0/24:443    127.0.0.1    443    ::1
  |           ^^^^^^^^^^^^^^^^^^ expected listen=transparent (--listen-transparent), or an address and a port

error: 203.0.113.7/24 has bits set behind its length
 --> /etc/mmproxy/instances.tsv:2:5
  |
2 | b    1    203.0.113.7/24:443    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^^^^^^ expected 203.0.113.0/24:443

error: nothing is routed to a Unix socket, unix:/run/x.sock
 --> /etc/mmproxy/instances.tsv:3:5
  |
3 | c    1    unix:/run/x.sock    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^^^^                               ------------------ how it listens
  |           |
  |           expected an address or a network, and a port

error: 'all' is not a way to listen
 --> /etc/mmproxy/instances.tsv:4:44
  |
4 | d    1    192.0.2.9:443    127.0.0.1    443    ::1    listen=all
  |                                                              ^^^ expected transparent, or no listen= (the address is column 3, listen_addr)

error: 127.0.0.1 covers loopback, which is never routed
 --> /etc/mmproxy/instances.tsv:5:5
  |
5 | e    1    127.0.0.1:444    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^                               ------------------ how it listens
  |           |
  |           expected the addresses that are routed to this host, with a port or a range, such as 203.0.113.0/24:443 or [2001:db8:5::]/64:10000-10999, or 0.0.0.0:444 for whatever rules of your own hand over

error: 0.0.0.0/0 is every address there is, this host's own services' too
 --> /etc/mmproxy/instances.tsv:6:5
  |
6 | f    1    0.0.0.0/0:444    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^ expected the addresses that are routed to this host, with a port or a range, such as 203.0.113.0/24:443 or [2001:db8:5::]/64:10000-10999
"#]]
    );
    assert_data_eq!(
        said_of_instances(
            "a\t1\t203.0.113.0/24:400-500\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             b\t1\t203.0.113.7:443\t127.0.0.1\t443\t::1\n\
             c\t1\t203.0.113.128/25:500-600\t127.0.0.1\t443\t::1\tlisten=transparent\n\
             d\t2\t203.0.113.7:443\t127.0.0.1\t443\t::1\tprotocol=udp\n"
        ),
        str![[r#"
error: what is sent to 203.0.113.7:443 (tcp) belongs to another instance as well
 --> /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    203.0.113.0/24:400-500    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^^^^^^^^^^ expected addresses or ports of its own
  |
 ::: /etc/mmproxy/instances.tsv:2:5
  |
2 | b    1    203.0.113.7:443    127.0.0.1    443    ::1
  |           --------------- the other instance

error: what is sent to 203.0.113.0/24:400-500 (tcp) belongs to another instance as well
 --> /etc/mmproxy/instances.tsv:3:5
  |
3 | c    1    203.0.113.128/25:500-600    127.0.0.1    443    ::1    listen=transparent
  |           ^^^^^^^^^^^^^^^^^^^^^^^^ expected addresses or ports of its own
  |
 ::: /etc/mmproxy/instances.tsv:1:5
  |
1 | a    1    203.0.113.0/24:400-500    127.0.0.1    443    ::1    listen=transparent
  |           ---------------------- the other instance
"#]]
    );
}

#[test]
fn transparent_listeners_are_the_pathways_affair() {
    let dir = directory(
        "1\n2\n",
        "a\t1\t203.0.113.0/24:443\t127.0.0.1\t443\t::1\tlisten=transparent\n\
         b\t1\t192.0.2.9:443\t127.0.0.1\t443\t::1\n\
         c\t2\t0.0.0.0:8443\t127.0.0.1\t443\t::1\tlisten=transparent\n",
        PROXY,
    );
    let read = load_with(dir.path(), None).unwrap();
    let wanted: Vec<_> = read.pathways[0]
        .interceptions
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(wanted, ["tcp 203.0.113.0/24:443"]);
    // a wildcard takes what rules of somebody else's bring
    assert!(read.pathways[1].interceptions.is_empty());
    assert_eq!(read.instances[2].listen.to_string(), "0.0.0.0:8443");
}

/// Not only the very mark: under the mask of the listener's pathway another one can look the same.
#[test]
fn marks_that_look_like_intercepted_packets() {
    for (pathways, taken) in [
        ("123\n8192\n", Some("8192")),
        ("123\n0x2100 mask=0xff00\n", Some("8448")),
        ("123\n0x2101 mask=0xffff\n", None),
        ("123 mask=0xffff\n0x2100 mask=0xff00\n", None),
    ] {
        let dir = directory(
            pathways,
            "a\t123\t203.0.113.0/24:443\t127.0.0.1\t443\t::1\tlisten=transparent\n",
            PROXY,
        );
        let said = match load_pathways(dir.path()) {
            Ok(_) => None,
            Err(found) => Some(found.to_string()),
        };
        match taken {
            None => assert_eq!(said, None, "{pathways}"),
            Some(mark) => {
                let said = said.expect(pathways);
                let expected = format!(
                    "packets of mark {mark} look like those that are handed to a transparent listener"
                );
                assert!(said.contains(&expected), "{said}");
                assert!(
                    said.contains("what is routed here for 203.0.113.0/24:443"),
                    "{said}"
                );
            }
        }
    }
}
