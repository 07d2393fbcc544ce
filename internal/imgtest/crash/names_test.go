package crash_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

func TestMain(m *testing.M) {
	crash.RunChild(namesTable())
	os.Exit(m.Run())
}

const bundleSize = 512<<10 - 512

// namesTable is every operation that makes or replaces files by name. A new
// one is one line.
func namesTable() []crash.NamesOp {
	return append(fsckNames(), []crash.NamesOp{
		{Name: "ploop/bundle is made", Setup: func(string) error { return nil }, Run: createBundle, Judge: bundleOrNone},
		{Name: "ploop/descriptor is replaced", Setup: oldBundle, Run: replaceDescriptor, Judge: oldOrNew},
	}...)
}

var bundleOptions = ploop.CreateOptions{Size: bundleSize, ClusterSize: ploop.MinCluster}

// createBundle does what its user does when it is done again: a bundle that is
// there is the one that was wanted.
func createBundle(ctx context.Context, dir string) error {
	err := ploop.CreateBundle(ctx, dir, bundleOptions)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, ploop.DescriptorName))
	return err
}

// bundleOrNone: as soon as there is a descriptor there is a whole bundle.
func bundleOrNone(ctx context.Context, dir string, done bool) error {
	_, err := os.Stat(filepath.Join(dir, ploop.DescriptorName))
	if errors.Is(err, fs.ErrNotExist) && !done {
		return nil
	}
	if err != nil {
		return err
	}
	s, err := open.Open(ctx, dir, open.Options{})
	if err != nil {
		return err
	}
	if s.Size() != bundleSize {
		err = fmt.Errorf("a disk of %d bytes", s.Size())
	}
	return errors.Join(err, s.Close())
}

func oldBundle(dir string) error {
	return ploop.CreateBundle(context.Background(), dir, bundleOptions)
}

const remark = "<!-- replaced -->"

func replaceDescriptor(_ context.Context, dir string) error {
	name := filepath.Join(dir, ploop.DescriptorName)
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), remark) {
		b = append(b, "\n"+remark+"\n"...)
	}
	d, err := ploop.ParseDescriptor(b)
	if err != nil {
		return err
	}
	return d.Store(name)
}

// oldOrNew: the bundle is whole at any time, and has the new descriptor once
// it was stored.
func oldOrNew(ctx context.Context, dir string, done bool) error {
	if err := bundleOrNone(ctx, dir, true); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, ploop.DescriptorName))
	if err == nil && done && !strings.Contains(string(b), remark) {
		err = errors.New("stored, but the old one is there")
	}
	return err
}
