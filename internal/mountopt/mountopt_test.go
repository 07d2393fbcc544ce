package mountopt

import (
	"os/user"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		list string
		want Options
	}{
		{"", Options{}},
		{"defaults", Options{}},
		// What mount(8) passes for "mount -t fuse.mount-image IMAGE DIR".
		{"rw,dev,suid", Options{Write: ptr(true), Flags: []string{"dev", "suid"}}},
		// What it passes from fstab, and what it might.
		{"ro,noauto,nofail,_netdev,user=joe,x-systemd.automount,X-mount.mkdir=0755,comment=a=b,nosuid,nodev,noexec",
			Options{Write: ptr(false), Flags: []string{"nosuid", "nodev", "noexec"}}},
		{"rw,ro", Options{Write: ptr(false)}},
		{"ro,rw", Options{Write: ptr(true)}},
		{"allow_other,default_permissions", Options{AllowOther: true}},
		{"allow_root", Options{AllowRoot: true}},
		{"uid=0,gid=4294967294,umask=0027", Options{UID: ptr(uint32(0)), GID: ptr(uint32(1<<32 - 2)), Umask: ptr(uint32(0o27))}},
		{"uid=root", Options{UID: ptr(uint32(0))}},
		{"loop,scratch,partitions,sector_size=4096", Options{Loop: true, Scratch: true, Partitions: true, SectorSize: 4096}},
		{"snapshot=a b,format=qcow2,backing_format=raw,cache_size=1G,log=/x",
			Options{Snapshot: "a b", Format: "qcow2", BackingFormat: "raw", CacheSize: "1G", Log: "/x"}},
		{`allow_path=/a\,b,allow_path="/c,d"`, Options{AllowPath: []string{"/a,b", "/c,d"}}},
		{"sandbox=off,run_as=nobody", Options{Sandbox: "off", RunAs: "nobody"}},
		{"snapshot=a=b", Options{Snapshot: "a=b"}},
		{",,ro,", Options{Write: ptr(false)}},
	} {
		var got Options
		if err := got.Parse(c.list); err != nil {
			t.Errorf("%q: %v", c.list, err)
		} else if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%q: -want +got\n%s", c.list, diff)
		}
	}
}

func TestUserNames(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	var o Options
	if err := o.Parse("uid=" + me.Username); err != nil || o.UID == nil {
		t.Error(err)
	}
}

func TestWrong(t *testing.T) {
	for _, list := range []string{
		"foo", "ro,foo", "foo=bar", "ro=1", "scratch=yes", "uid=", "uid=-1", "uid=4294967296", "uid=4294967295", "gid=4294967295", "uid=no such user",
		"gid=no such group", "umask=", "umask=8", "umask=1777", "umask=-1", "sector_size=x", "snapshot", "snapshot=", "format=",
		"allow_path=", "nodev=1", "RO", "subtype=x", "fsname=x", "max_read=1",
	} {
		var o Options
		if err := o.Parse(list); err == nil {
			t.Errorf("%q accepted: %+v", list, o)
		} else if !strings.Contains(err.Error(), "mount option") {
			t.Errorf("%q: %v", list, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`rw,uid=0,allow_path="a,b",snapshot=x\,y`)
	f.Fuzz(func(t *testing.T, list string) {
		if strings.Contains(list, "id=") {
			return // asks the system's data base of users
		}
		var o Options
		_ = o.Parse(list)
	})
}
