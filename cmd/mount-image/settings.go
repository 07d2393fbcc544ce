package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/mountopt"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers/open"
)

// settings are what flags and -o options say together.
type settings struct {
	image, dir  string
	open        open.Options
	partitions  bool
	loop        bool
	sectorSize  uint32
	json        bool
	verbose     bool
	log         string
	uid, gid    uint32
	umask       uint32
	allowOther  bool
	mountFlags  []string
	sandbox     sandbox.Mode
	passthrough passthrough
	transport   transport
	user        *sandbox.User // to become, nil to stay
}

func newSettings(f *flags) (*settings, error) {
	o := mountopt.Options{
		Loop: f.Loop, Scratch: f.Scratch, Flat: f.Flat, Partitions: f.Partitions, SectorSize: f.SectorSize, Snapshot: f.Snapshot,
		Format: f.Format, BackingFormat: f.BackingFormat, AllowPath: f.AllowPath, Log: f.Log,
	}
	for _, list := range f.Options {
		if err := o.Parse(list); err != nil {
			return nil, err
		}
	}
	if f.Write {
		if o.Write != nil && !*o.Write {
			return nil, errors.New("-w and -o ro exclude each other")
		}
		o.Write = &f.Write
	}
	if o.Scratch && o.Write != nil && !*o.Write {
		return nil, errors.New("scratch and ro exclude each other")
	}
	if o.Flat && !o.Scratch && o.Write != nil && *o.Write {
		return nil, errors.New("a flat view is read-only, or thrown away with --scratch")
	}
	if o.CacheSize != "" {
		n, err := cli.ParseSize(o.CacheSize)
		if err != nil {
			return nil, err
		}
		f.CacheSize = cli.Size(n)
	}
	for flag, format := range map[string]string{"format": o.Format, "backing-format": o.BackingFormat} {
		switch format {
		case "", "raw", "ploop", "parallels", "qcow2":
		default:
			return nil, fmt.Errorf("%s %q: want raw, ploop (alias parallels) or qcow2", flag, format)
		}
	}
	switch o.SectorSize {
	case 0, 512, 4096:
	default:
		return nil, fmt.Errorf("sector size %d: want 512 or 4096", o.SectorSize)
	}
	s := &settings{
		image: f.Image, dir: f.Dir,
		open: open.Options{
			Writable: o.Write != nil && *o.Write && !o.Scratch, Scratch: o.Scratch, Flat: o.Flat,
			Format: o.Format, BackingFormat: o.BackingFormat, Snapshot: o.Snapshot,
			AllowPaths: o.AllowPath, CacheSize: int64(f.CacheSize),
			// The block device has a page cache of its own.
			DontCache: o.Loop,
		},
		partitions: o.Partitions, loop: o.Loop, sectorSize: o.SectorSize, json: f.JSON, verbose: f.Verbose, log: o.Log,
		uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()), umask: 0o077,
		allowOther: o.AllowOther || o.AllowRoot,
	}
	if err := s.isolation(f, &o); err != nil {
		return nil, err
	}
	var err error
	if s.passthrough, err = oneOf("passthrough", f.Passthrough, o.Passthrough, throughAuto, throughOn, throughOff); err != nil {
		return nil, err
	}
	if s.transport, err = oneOf("transport", f.Transport, o.Transport, transportAuto, transportDev, transportURing); err != nil {
		return nil, err
	}
	if o.AllowOther {
		s.umask = 0o022
	}
	if o.UID != nil {
		s.uid = *o.UID
	}
	if o.GID != nil {
		s.gid = *o.GID
	}
	if o.Umask != nil {
		s.umask = *o.Umask
	}
	if o.AllowRoot && !o.AllowOther {
		// The kernel knows allow_other only; the permissions, which it
		// checks, keep out everybody but root.
		s.umask |= 0o077
	}
	for _, flag := range o.Flags {
		if os.Geteuid() != 0 && (flag == "dev" || flag == "suid") {
			continue // mount(8) passes them without being asked; only root may
		}
		s.mountFlags = append(s.mountFlags, flag)
	}
	return s, nil
}

// isolation understands --sandbox and --uid.
func (s *settings) isolation(f *flags, o *mountopt.Options) (err error) {
	if s.sandbox, err = oneOf("sandbox", f.Sandbox, o.Sandbox, sandbox.Auto, sandbox.Require, sandbox.Off); err != nil {
		return err
	}
	name := f.UID
	if o.RunAs != "" {
		name = o.RunAs
	}
	if name == "" {
		return nil
	}
	if s.sandbox == sandbox.Off {
		return errors.New("--uid and --sandbox=off exclude each other")
	}
	if s.user, err = sandbox.LookupUser(name); err == nil && os.Geteuid() != 0 && s.user.UID != os.Geteuid() {
		err = errors.New("only root can run the server as another user")
	}
	return err
}

// oneOf is what a flag says, or an option of -o in its place, if it is one of
// three words.
func oneOf[T ~string](name string, flag T, option string, a, b, c T) (T, error) {
	v := flag
	if option != "" {
		v = T(option)
	}
	if v != a && v != b && v != c {
		return v, fmt.Errorf("%s %q: want %s, %s or %s", name, v, a, b, c)
	}
	return v, nil
}
