"""A test that is skipped must say why."""

import pytest

from tests import conftest

pytest_plugins = ["pytester"]


def test_a_skip_without_a_reason_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import pytest_runtest_makereport\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.skip
        def test_marked(): pass

        def test_called(): pytest.skip("")

        @pytest.mark.skip(reason="needs a GPU")
        def test_with_reason(): pass

        def test_import(): pytest.importorskip("no_such_module_anywhere")

        @pytest.mark.xfail(reason="known")
        def test_expected(): assert False
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, errors=1, skipped=2, xfailed=1)


def test_the_list_of_empty_reasons_is_pytests() -> None:
    assert conftest.NO_REASON == ("", "unconditional skip")
