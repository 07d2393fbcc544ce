// Package mountopt understands the -o options of mount(8), as they arrive from
// a command line, from mount.fuse and from /etc/fstab.
package mountopt

import (
	"errors"
	"fmt"
	"math"
	"os/user"
	"strconv"
	"strings"
)

// Options is what a list of options says. Fields that were not mentioned keep
// their value.
type Options struct {
	Write         *bool // rw or ro, nil when neither was given
	AllowOther    bool
	AllowRoot     bool // allow_other, with permissions for nobody but the owner (and root)
	UID, GID      *uint32
	Umask         *uint32
	Loop          bool
	SectorSize    uint32
	Scratch       bool
	Flat          bool
	Partitions    bool
	Snapshot      string
	Format        string
	BackingFormat string
	AllowPath     []string
	CacheSize     string
	Log           string
	Sandbox       string   // auto, require or off
	Passthrough   string   // auto, on or off
	Transport     string   // auto, dev or uring
	RunAs         string   // user whom the server becomes
	Flags         []string // options for the kernel, such as noexec
}

// flags are passed to the kernel.
var flags = words("nodev nosuid noexec dev suid exec atime noatime relatime norelatime strictatime " +
	"nostrictatime diratime nodiratime sync async dirsync")

// ignored are for mount(8) and for those who read /etc/fstab, or are what
// happens anyway.
var ignored = words("defaults auto noauto user users nouser owner group nogroup noowner nofail fail _netdev " +
	"default_permissions nonempty remount_ok silent loud mand nomand")

func words(s string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(s) {
		m[w] = true
	}
	return m
}

// Parse reads a comma-separated list into o. Later options win over earlier
// ones. A comma in a value is written \, or the value is put in double quotes.
func (o *Options) Parse(list string) error {
	for _, opt := range split(list) {
		if err := o.one(opt); err != nil {
			return err
		}
	}
	return nil
}

// split cuts at commas that are neither escaped nor quoted.
func split(list string) []string {
	var out []string
	var b strings.Builder
	quoted := false
	for i := 0; i < len(list); i++ {
		switch c := list[i]; {
		case c == '\\' && i+1 < len(list):
			i++
			b.WriteByte(list[i])
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(c)
		}
	}
	return append(out, b.String())
}

func (o *Options) one(opt string) error {
	name, value, hasValue := strings.Cut(opt, "=")
	lower := strings.ToLower(name)
	switch {
	case opt == "", strings.HasPrefix(lower, "x-"), name == "comment", name == "user" && hasValue:
		return nil
	case flags[opt]:
		o.Flags = append(o.Flags, opt)
		return nil
	case ignored[opt]:
		return nil
	}
	set := map[string]func(){
		"rw":          func() { o.Write = ptr(true) },
		"ro":          func() { o.Write = ptr(false) },
		"allow_other": func() { o.AllowOther = true },
		"allow_root":  func() { o.AllowRoot = true },
		"loop":        func() { o.Loop = true },
		"scratch":     func() { o.Scratch = true },
		"flat":        func() { o.Flat = true },
		"partitions":  func() { o.Partitions = true },
	}
	if f, ok := set[name]; ok {
		if hasValue {
			return fmt.Errorf("mount option %q takes no value", name)
		}
		f()
		return nil
	}
	text := map[string]*string{
		"snapshot": &o.Snapshot, "format": &o.Format, "backing_format": &o.BackingFormat,
		"cache_size": &o.CacheSize, "log": &o.Log,
		"sandbox": &o.Sandbox, "passthrough": &o.Passthrough, "transport": &o.Transport, "run_as": &o.RunAs,
	}
	if p, ok := text[name]; ok {
		if value == "" {
			return fmt.Errorf("mount option %q needs a value", name)
		}
		*p = value
		return nil
	}
	var err error
	switch name {
	case "uid":
		o.UID, err = id(value, func(s string) (string, error) {
			u, err := user.Lookup(s)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
	case "gid":
		o.GID, err = id(value, func(s string) (string, error) {
			g, err := user.LookupGroup(s)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
	case "umask":
		var n uint64
		n, err = strconv.ParseUint(value, 8, 32)
		if err == nil && n > 0o777 {
			err = strconv.ErrRange
		}
		o.Umask = ptr(uint32(n))
	case "sector_size":
		var n uint64
		n, err = strconv.ParseUint(value, 10, 32)
		o.SectorSize = uint32(n)
	case "allow_path":
		if value == "" {
			err = strconv.ErrSyntax
		}
		o.AllowPath = append(o.AllowPath, value)
	default:
		return fmt.Errorf("unknown mount option %q", opt)
	}
	if err != nil {
		return fmt.Errorf("mount option %q: %w", opt, err)
	}
	return nil
}

// id reads a number or looks a name up.
func id(value string, lookup func(string) (string, error)) (*uint32, error) {
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil && value != "" {
		var number string
		if number, err = lookup(value); err == nil {
			n, err = strconv.ParseUint(number, 10, 32)
		}
	}
	if err == nil && n == math.MaxUint32 {
		err = errors.New("that number stands for nobody") // -1 of chown(2)
	}
	if err != nil {
		return nil, err
	}
	return ptr(uint32(n)), nil
}

func ptr[T any](v T) *T { return &v }
